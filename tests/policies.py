"""Policies of every supported architecture in memory, with one kind of adapter, all of it random."""

from typing import Any

import torch
from architectures import ARCHITECTURES, lora_config
from peft import PeftModel, get_peft_model


def make_policy(
    architecture: str = "qwen2",
    adapter: str = "all-linear",
    dtype: torch.dtype = torch.float64,
    *,
    tied: bool = False,
    base: Any = None,
) -> PeftModel:
    """Biases and every trained tensor moved away from what initialisation gives them."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = ARCHITECTURES[architecture](tie_word_embeddings=tied) if base is None else base
        for name, p in base.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.2)
        model = get_peft_model(base, lora_config(architecture, adapter))
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
    return model.to(dtype).eval()
