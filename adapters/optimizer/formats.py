"""The format of a path, and the importer that reads it."""

from pathlib import Path

from funcprobe.types import InputError

from ..machine.pointers import pointer
from . import dcp, deepspeed, eight_bit, fsdp, verl
from .saved import TORCH, TRAINER, Saved, located
from .torch_file import well_formed

_KNOWN = (
    "optimizer.pt, optimizer.bin, optimizer_0/, optimizer_0_rank0.bin, zero/, "
    "optim_world_size_1_rank_0.pt"
)
_NONE = (
    "trainers write none with save_only_model = True or in save_model(); train with "
    "save_only_model = False and give a checkpoint-N folder, or set "
    'optimizer.rule = "sgd", which needs no optimizer state'
)


def open_state(path: Path) -> Saved:
    """The state in a file or folder, as saved. InputError if no importer can read it."""
    try:
        return _opened(path)
    except InputError as error:
        if missing := pointer(path, "**/*optim*", "**/*.distcp", "zero/**/*"):
            raise missing from error
        raise


def _opened(path: Path) -> Saved:
    if path.is_dir():
        if dcp.recognises(path):
            return dcp.read(path)
        if deepspeed.recognises(path):
            return deepspeed.read(path)
        return _opened(find_state(path))
    if verl.recognises(path):
        return verl.read(path)
    if path.name.endswith("_optim_states.pt"):  # one partition of a ZeRO folder
        return deepspeed.read(path.parent)
    content = fsdp.load(path)
    plain = TRAINER if (path.parent / "trainer_state.json").is_file() else TORCH
    saved = well_formed(path, content, "accelerate" if path.suffix == ".bin" else plain)
    if saved.by_name:
        saved = saved._replace(format="FSDP full state")
    return eight_bit.dequantised(saved)


def find_state(checkpoint: Path) -> Path:
    """The single optimizer state in a checkpoint folder.

    Raises InputError if there is none, with the usual reason and what to set, or several.
    """
    found = [
        path for path in (checkpoint / "optimizer.pt", checkpoint / "optimizer.bin") if path.is_file()
    ]
    found += sorted(p for p in checkpoint.glob("optimizer_*.bin") if p.stem[10:].isdecimal())
    found += [*fsdp.inside(checkpoint), *dcp.inside(checkpoint)]
    found += [*deepspeed.inside(checkpoint), *verl.inside(checkpoint)]
    if len(found) == 1:
        return found[0]
    if found:
        near = [p.relative_to(checkpoint) if p.is_relative_to(checkpoint) else p for p in found]
        names = ", ".join(map(str, near))
        raise located(checkpoint, f"several optimizer states ({names}): set optimizer.state to one")
    inside = sorted(checkpoint.glob("checkpoint-*/optimizer.pt"), key=lambda p: p.stat().st_mtime)
    why = _NONE
    if inside:
        why = f"give {inside[-1].parent.name}, which contains one"
    elif not checkpoint.is_dir():
        why = "it is not a folder; give a trainer's checkpoint folder"
    raise located(checkpoint, f"no optimizer state ({_KNOWN}): {why}")
