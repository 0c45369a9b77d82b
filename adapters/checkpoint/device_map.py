"""A base whose layers are on several devices, as accelerate places them for transformers."""

from typing import Any

import torch

from funcprobe.types import InputError

from ..config.schema import PolicyConfig
from ..machine.devices import resolve_device

_REMEDY = (
    'give it more or larger GPUs, a smaller policy.dtype or policy.mode = "qlora"; or leave '
    'policy.device_map out, with run.device = "cpu"'
)


def placement(config: PolicyConfig, device: torch.device) -> dict[str, Any]:
    """The arguments of from_pretrained that place the base; none: on the CPU, for the caller to move.

    A 4-bit base is quantised where it is to stay, as quantisation on another device may round to
    another of the sixteen levels. InputError for a table with a device that is not there, and for one
    of both CPU and GPUs, whose CPU part accelerate would copy to a GPU at each call.
    """
    chosen = config.device_map
    if chosen is None:
        return {"device_map": {"": str(device)}} if config.mode == "qlora" else {}
    if isinstance(chosen, str):
        return {"device_map": chosen}
    named = {module: f"cuda:{at}" if isinstance(at, int) else at for module, at in chosen.items()}
    found = {name: resolve_device(name, "policy.device_map") for name in named.values()}
    if len({one.type for one in found.values()}) > 1:
        raise InputError(
            "policy.device_map has layers on the CPU and on GPUs, where accelerate copies those of the "
            f"CPU to a GPU at each call, which derivatives cannot follow: {_REMEDY}"
        )
    return {"device_map": {module: str(found[name]) for module, name in named.items()}}


def require_in_place(base: Any, base_id: str, config: PolicyConfig) -> None:
    """InputError if accelerate left layers on the CPU or the disk, for want of memory on the GPUs.

    And for a table with a name that is none of the base's.
    """
    if isinstance(config.device_map, dict):
        own = {name for name, _ in (*base.named_modules(), *base.named_parameters())}
        if unknown := sorted(config.device_map.keys() - own):
            raise InputError(
                f"policy.device_map has {unknown[0]}, which base {base_id} has not: use names of its "
                "modules, as model.layers.0 and lm_head"
            )
    places: dict[str, Any] = getattr(base, "hf_device_map", None) or {}
    away = [module for module, at in places.items() if str(at) in {"cpu", "disk"}]
    if away and (len(away) < len(places) or "disk" in map(str, places.values())):
        raise InputError(
            f"base {base_id} does not fit into the free memory of the GPUs: {len(away)} of its "
            f"{len(places)} parts, as {away[0]}, would be on the {places[away[0]]}: {_REMEDY}"
        )
