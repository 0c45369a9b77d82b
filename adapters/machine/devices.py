"""The device that a run uses, and the random states of all devices."""

from contextlib import AbstractContextManager

import torch

from funcprobe.policy.placement import devices_of
from funcprobe.types import InputError

from .launcher import local_rank, local_size


def resolve_device(name: str, key: str = "run.device") -> torch.device:
    """The device of that name; "auto": a GPU if there is one. InputError if it is not available.

    Of several processes on this machine each has the GPU of its local rank. `key` is the setting that
    it is from.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    own = local_rank()
    if own is not None and local_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise InputError(
                f'{key} = "{name}" is one GPU for {local_size()} processes: use "cuda" or "auto", by '
                "which each has its own"
            )
        name = f"cuda:{own}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f'{key} = "{name}": expected "auto", "cpu", "cuda" or "cuda:N"') from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f'{key} = "{name}", but torch finds {torch.cuda.device_count()} CUDA devices: '
            'use "auto" or "cpu", or install a CUDA build of torch'
        )
    if device.type not in {"cpu", "cuda"} or (device.type == "cpu" and device.index):
        raise InputError(f'{key} = "{name}": expected "auto", "cpu", "cuda" or "cuda:N"')
    return device


def where(model: torch.nn.Module) -> str:
    """The devices of a model's parameters: "cuda:0, cuda:1"."""
    return ", ".join(map(str, devices_of(model)))


def random_state_kept() -> AbstractContextManager[None]:
    """On leaving, torch's random states are as they were: the CPU's, and every accelerator's in use.

    torch.manual_seed() sets all of them, wherever the model is. An accelerator that this process has
    not started has none, and to ask for it would start it.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.random.fork_rng(devices=())
    module = torch.get_device_module(accelerator)
    started = getattr(module, "is_initialized", lambda: True)()
    devices = range(module.device_count() if started else 0)
    return torch.random.fork_rng(devices=devices, device_type=accelerator.type)
