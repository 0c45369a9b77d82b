"""The device that a run uses."""

import torch

from funcprobe.types import InputError


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto": a GPU if there is one. InputError if it is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f'run.device = "{name}": expected "auto", "cpu", "cuda" or "cuda:N"'
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f'run.device = "{name}", but torch finds {torch.cuda.device_count()} CUDA devices: '
            'use "auto" or "cpu", or install a CUDA build of torch'
        )
    if device.type not in {"cpu", "cuda"} or (device.type == "cpu" and device.index):
        raise InputError(f'run.device = "{name}": expected "auto", "cpu", "cuda" or "cuda:N"')
    return device
