"""Files that FSDP's processes write with torch.save, whose tensors may be DTensors (shards)."""

from pathlib import Path
from typing import Any

import torch

from funcprobe.types import InputError

from .torch_file import load_plain


def load(path: Path, *, mmap: bool = False) -> Any:
    """`load_plain`, with a DTensor of a single process as the plain tensor it contains.

    Raises InputError as `load_plain`, and for a DTensor of several processes, with its parameter.
    """
    from torch.distributed.tensor import DTensor  # weights_only accepts one only after this import

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {
                key: plain(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()
            }
        if not isinstance(value, DTensor):
            return value
        if (processes := value.device_mesh.size()) > 1:
            raise InputError(
                f"{name} is one process's shard of a tensor split over {processes} processes, expected "
                "whole tensors: save with torch.distributed.checkpoint (use_dcp = True in accelerate), "
                "or with StateDictOptions(full_state_dict=True)"
            )
        return value.to_local()

    with torch.no_grad():
        return plain(load_plain(path, mmap=mmap), "")


def inside(checkpoint: Path) -> list[Path]:
    """The first process's file, of those that accelerate writes with `use_dcp = False`."""
    return sorted(checkpoint.glob("optimizer_*_rank0.bin"))
