"""Files of torch.save that FSDP's processes write, whose tensors may be DTensors, parts of a whole."""

from pathlib import Path
from typing import Any

import torch

from funcprobe.types import InputError

from .torch_file import load_plain


def load(path: Path, *, mmap: bool = False) -> Any:
    """`load_plain`, with a DTensor of a single process as the plain tensor it holds.

    Raises InputError as `load_plain`, and for a DTensor of several processes, with its parameter.
    """
    from torch.distributed.tensor import DTensor  # weights_only reads one only after this import

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {
                key: plain(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()
            }
        if not isinstance(value, DTensor):
            return value
        if (processes := value.device_mesh.size()) > 1:
            raise InputError(
                f"{name} is one process's part of a tensor that {processes} processes hold, expected "
                "whole ones: save with torch.distributed.checkpoint (use_dcp = True in accelerate), or "
                "with StateDictOptions(full_state_dict=True)"
            )
        return value.to_local()

    with torch.no_grad():
        return plain(load_plain(path, mmap=mmap), "")


def inside(checkpoint: Path) -> list[Path]:
    """What accelerate's `use_dcp = False` writes: a file for each process, of which the first."""
    return sorted(checkpoint.glob("optimizer_*_rank0.bin"))
