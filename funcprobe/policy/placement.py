"""Where a model's tensors are: on one device, on several with hooks between them, or out of reach.

accelerate (1.14) splits a model by replacing the forward of its modules by one that first moves the
inputs to the module's device. That is differentiable in every mode, so that such a model is a function
of its parameters like any other. Where hooks also fetch the weights, or a process has a part of them
only, it is not.
"""

import copy
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from ..types import InputError
from .suitability import causal_lm

# Hooks of accelerate that change weights at a call; `AlignDevicesHook` does so with `offload` alone.
_FETCHING = {"CpuOffload", "UserCpuOffloadHook", "LayerwiseCastingHook"}
_WHOLE = (
    "save a checkpoint and run funcprobe on that, where each process has the whole model (torchrun) or "
    'its layers are on several devices (policy.device_map = "auto")'
)


T = TypeVar("T", bound=nn.Module)


def unwrapped(model: Any) -> Any:
    """The module inside DistributedDataParallel and DataParallel, whose copy every process has."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def input_device(model: nn.Module) -> torch.device:
    """The device of the input embedding, where tokens are expected."""
    return _device_of(causal_lm(model).get_input_embeddings())


def head_device(model: nn.Module) -> torch.device:
    """The device of the output embedding."""
    return _device_of(causal_lm(model).get_output_embeddings())


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """All devices of a model's parameters, in the order of the model."""
    return tuple(dict.fromkeys(p.device for p in model.parameters()))


def is_hooked(module: nn.Module) -> bool:
    """Whether a call does more than the module's own forward and moving its inputs to its device."""
    replaced = "forward" in vars(module) and not _only_moves(module)
    return bool(module._forward_hooks or module._forward_pre_hooks) or replaced


def twin_of(module: T) -> T:
    """A shallow copy, whose replaced forward, if it has one of accelerate's, is the copy's own.

    It would otherwise call the original, whatever else were changed in the copy.
    """
    twin = copy.copy(module)
    own = vars(twin)
    for name in ("forward", "_old_forward"):
        own |= {name: _rebound(own[name], module, twin)} if name in own else {}
    return twin


def refuse_out_of_reach(model: nn.Module) -> None:
    """InputError for weights that this process does not have, or only while their layer is called."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise InputError(
                f"{name or 'the model'} is wrapped by FullyShardedDataParallel, so that no process has "
                f"the whole weights: {_WHOLE}"
            )
        if fetching := [hook for hook in _hooks(module) if _fetches(hook)]:
            raise InputError(
                f"{name or 'the model'} is offloaded: accelerate's {type(fetching[0]).__name__} moves "
                "or casts its weights at each call, while derivatives need them in place: put all "
                "layers on devices that hold them (more GPUs, a smaller dtype, policy.mode = "
                '"qlora"), or all on the CPU'
            )
    for name, p in model.named_parameters():
        if hasattr(p, "device_mesh"):  # DTensor, of FSDP2 and of tensor parallelism
            places = ", ".join(str(place) for place in getattr(p, "placements", ()))
            raise InputError(
                f"{name} is a DTensor ({places}) over {p.device_mesh.size()} processes, as FSDP2 "
                f"(fully_shard) and tensor parallelism (tp_plan) make it, which has no derivatives in "
                f"forward mode: {_WHOLE}"
            )
        if hasattr(p, "ds_id"):
            raise InputError(
                f"{name} is partitioned by DeepSpeed's ZeRO-3, so that no process has the whole "
                f"weight: {_WHOLE}"
            )
        if p.is_meta:
            raise InputError(
                f"{name} is on the meta device, without values: load the model with weights; where it "
                "does not fit, on more GPUs, in a smaller dtype, or wholly on the CPU"
            )


def _device_of(module: nn.Module) -> torch.device:
    for p in module.parameters():
        return p.device
    weight: Any = module.weight  # no parameter, as of a 4-bit layer
    device: torch.device = weight.device
    return device


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module itself; peft's wrappers answer for what they wrap."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _fetches(hook: Any) -> bool:
    return bool(getattr(hook, "offload", False)) or type(hook).__name__ in _FETCHING


def _only_moves(module: nn.Module) -> bool:
    """Whether the replaced forward is the class's own behind accelerate's hooks that move tensors."""
    own, hooks = vars(module).get("_old_forward"), _hooks(module)
    kept = getattr(own, "__func__", None) is type(module).forward
    aligned = [type(h).__name__ == "AlignDevicesHook" and not _fetches(h) for h in hooks]
    return kept and bool(hooks) and all(aligned)


def _rebound(call: Any, module: nn.Module, twin: nn.Module) -> Any:
    if isinstance(call, MethodType) and call.__self__ is module:
        return MethodType(call.__func__, twin)
    if isinstance(call, partial) and call.args[:1] == (module,):
        return partial(call.func, twin, *call.args[1:], **call.keywords)
    return call
