"""Sidecars that name the parameters of an optimizer's state."""

import json
from typing import Any

import torch

from funcprobe.adapters.checkpoint.skeleton import skeleton
from support.checkpoints import Checkpoint


def sidecar_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Any]:
    name_of = {id(p): n for n, p in model.named_parameters()}
    return {
        "format": "funcprobe.optimizer_param_names",
        "version": 1,
        "global_step": 2,
        "groups": [
            {
                "names": [name_of[id(p)] for p in group["params"]],
                "shapes": [list(p.shape) for p in group["params"]],
            }
            for group in optimizer.param_groups
        ],
        "max_grad_norm": 0.3,
        "loss": {"loss_type": "grpo"},
        "sampling": {"temperature": 0.9},
        "versions": {"torch": "2.13.0"},
    }


def with_sidecar(place: Checkpoint, **changes: Any) -> None:
    model = skeleton(place.adapter, None, "default").model
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}, {"params": []}]
    content = sidecar_of(torch.optim.AdamW(groups), model) | changes
    (place.adapter / "optimizer_param_names.json").write_text(json.dumps(content))
