"""What torch makes of a file from a stranger, before anything walks through it or prints it.

A pickle of a hundred bytes can hold a structure that contains itself, or one that refers to each of its
parts twice, level by level, and is as large as 2**30 when it is walked through; and a tensor whose
shape promises more numbers than the file has.
"""

from collections.abc import Iterable
from typing import Any

import torch

from funcprobe.types import InputError

DEEPEST = 60  # containers within each other
TIMES, ALLOWANCE = 4, 1 << 20  # parts, and bytes of tensors, for each byte of the file; beside these
_CONTAINERS = (dict, list, tuple, set, frozenset)


def require_bounded(content: Any, size: int, record: type | None = None) -> None:
    """InputError for a structure that is larger, walked through, than its file of `size` bytes allows.

    For one that is too deep or contains itself, for tensors of more memory than the file has, and for
    ones that repeat few numbers over a larger shape, or have none. Objects of the class `record` are
    walked through by their attributes.
    """
    parts: dict[int, int] = {}
    storages: dict[int, int] = {}

    def count(value: Any, depth: int) -> int:
        inner = _inside(value, record)
        if inner is None:
            if isinstance(value, torch.Tensor):
                _require_own_numbers(value, storages)
            return 1
        if depth > DEEPEST:
            raise InputError(f"is nested more than {DEEPEST} deep, or contains itself: it is damaged")
        if id(value) not in parts:
            parts[id(value)] = 1 + sum(count(part, depth + 1) for part in inner)
        return parts[id(value)]

    most = TIMES * size + ALLOWANCE
    if count(content, 0) > most or sum(storages.values()) > most:
        raise InputError(f"claims more than its {size} bytes can hold: it is damaged")


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has its numbers on the CPU, one for each entry of its shape."""
    dense = tensor.device.type == "cpu" and tensor.layout is torch.strided
    return dense and not tensor.is_quantized and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _inside(value: Any, record: type | None) -> Iterable[Any] | None:
    """The parts of a container; None for anything else."""
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, _CONTAINERS):
        return value
    if record is not None and isinstance(value, record):
        return list(vars(value).values())
    return None


def _require_own_numbers(tensor: torch.Tensor, storages: dict[int, int]) -> None:
    if hasattr(tensor, "to_local"):  # a DTensor, of which this process has a part
        tensor = tensor.to_local()
    if not is_plain(tensor):
        return  # refused by name where it is used
    storage = tensor.untyped_storage()
    storages[storage.data_ptr()] = storage.nbytes()
    if tensor.numel() * tensor.element_size() > storage.nbytes():
        raise InputError(
            f"has a tensor of shape {tuple(tensor.shape)}, but {storage.nbytes()} bytes for its "
            "numbers: it is damaged"
        )
