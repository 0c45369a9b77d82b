"""DeepSpeed's universal checkpoints: `zero/NAME/{exp_avg,exp_avg_sq,step}.pt`, whole tensors by name.

`ds_to_universal` creates them from a ZeRO checkpoint, whose own files hold flat partitions. For ZeRO-3
the tensors stay flat, and their shapes are in the model's file; the groups' hyper-parameters are in
`zero/optimizer_state.pt`. (According to the source of DeepSpeed 0.19.8.)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from funcprobe.types import InputError

from .saved import Entry, Key, Saved, number, some
from .torch_file import load_plain

FORMAT = "DeepSpeed universal"
MOMENTS = ("exp_avg", "exp_avg_sq")

_PARTITIONS = "*_optim_states.pt"
_AGAIN = "copy or convert the checkpoint again"


def recognises(path: Path) -> bool:
    """Whether the folder is a universal checkpoint, its `zero`, or an unconverted ZeRO checkpoint."""
    return _is_universal(path) or any(path.glob(_PARTITIONS))


def inside(checkpoint: Path) -> list[Path]:
    """Universal folders in a checkpoint (only that of `latest_universal`, if given), else ZeRO's."""
    latest = checkpoint / "latest_universal"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not _is_universal(folder := checkpoint / Path(name).name):
            raise InputError(f"{latest}: names {name:.80}, not a universal folder: {_AGAIN}")
        return [folder]
    universal = sorted(folder.parent for folder in checkpoint.glob("*/zero") if _has_tensors(folder))
    return universal or sorted({file.parent for file in checkpoint.glob(f"*/{_PARTITIONS}")})


def read(path: Path) -> Saved:
    """The folder's state, groups and hyper-parameters; groups lack lr and others that are not saved.

    Raises InputError for a checkpoint that is not converted, with the command that does it; for a
    missing or damaged file, with its parameter; and if groups or shapes cannot be determined.
    """
    if not _is_universal(path):
        raise InputError(
            f"a partitioned DeepSpeed ZeRO checkpoint, expected a universal one: run `python -m "
            f"deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {path} "
            f"--output_folder {path}_universal` and give its output"
        )
    zero = path if _has_tensors(path) else path / "zero"
    common = _common(zero / "optimizer_state.pt")
    folders = sorted(folder for folder in zero.iterdir() if folder.is_dir())
    numbers = common.get("param_groups") or [{}]
    if not isinstance(numbers, list) or not all(isinstance(group, dict) for group in numbers):
        raise InputError(f"zero/optimizer_state.pt has malformed param_groups: {_AGAIN}")
    raw = {folder.name: _tensors(folder) for folder in folders}
    flat = any(torch.is_tensor(entry.get(key)) for entry in raw.values() for key in MOMENTS)
    shapes = _shapes(zero.parent) if flat or len(numbers) > 1 else [dict.fromkeys(raw, ())]
    groups = _groups(numbers, shapes, {name for name, entry in raw.items() if entry})
    flat_shapes = {name: shape for part in shapes for name, shape in part.items()}
    step = _common_step(common, numbers)
    state: dict[Key, Entry] = {
        name: _entry(name, entry, flat_shapes.get(name, ()), step)
        for name, entry in raw.items()
        if entry
    }
    return Saved(path, FORMAT, groups, state, tuple(_notes(groups)))


# Folders


def _is_universal(path: Path) -> bool:
    return _has_tensors(path / "zero") or (path.name == "zero" and _has_tensors(path))


def _has_tensors(zero: Path) -> bool:
    return any(file.name in _FILES for file in zero.glob("*/*.pt"))


_FILES = {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"}


# Tensors


def _tensors(folder: Path) -> dict[str, Any]:
    """Content of the parameter's files, as saved; empty if it was not trained."""
    there = {key for key in (*MOMENTS, "step") if (folder / f"{key}.pt").is_file()}
    if lost := sorted(set(MOMENTS) - there) if there else []:
        raise InputError(f"{folder.name} has no {lost[0]}.pt, but {some(there)}: {_AGAIN}")
    return {key: _load(folder / f"{key}.pt") for key in sorted(there)}


def _entry(name: str, raw: dict[str, Any], shape: tuple[int, ...], step: float | None) -> Entry:
    entry = {key: _shaped(f"{name}/{key}.pt", raw[key], shape) for key in MOMENTS}
    given = raw.get("step", step)
    return entry if given is None else entry | {"step": given}


def _shaped(file: str, content: Any, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = content.get("param") if isinstance(content, dict) else content
    if not torch.is_tensor(tensor):
        raise InputError(f"zero/{file} contains no tensor: {_AGAIN}")
    if isinstance(content, dict):
        return tensor
    if tensor.numel() != torch.Size(shape).numel():
        raise InputError(
            f"zero/{file} has {tensor.numel()} elements, its parameter has shape {tuple(shape)}: "
            f"{_AGAIN}"
        )
    return tensor.view(shape)


# Groups


def _groups(
    numbers: list[dict[str, Any]], shapes: list[dict[str, Any]], trained: set[str]
) -> list[dict[str, Any]]:
    if len(numbers) == 1:
        shapes = [{name: shape for part in shapes for name, shape in part.items()}]
    if len(shapes) != len(numbers):
        raise InputError(
            f"has {len(numbers)} param_groups and parameters in {len(shapes)} parts (ZeRO-3's "
            "sub_group_size), so that their groups are unknown: train with a larger sub_group_size"
        )
    if lost := trained - {name for part in shapes for name in part}:
        raise InputError(f"has state for {some(lost)}, not in any group of the model's file: {_AGAIN}")
    return [_group(group, part) for group, part in zip(numbers, shapes, strict=True)]


def _group(numbers: dict[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """A group with torch's keys. DeepSpeed's own Adam has no amsgrad; its LAMB also has max_coeff."""
    if numbers.get("bias_correction") is False:
        raise InputError(
            "state of Adam without bias correction, expected AdamW's: train with bias_correction = true"
        )
    # Handled here, or without effect on the step.
    group = {key: value for key, value in numbers.items() if key not in _OWN}
    if not numbers or ("bias_correction" in numbers and "max_coeff" not in numbers):
        group.setdefault("amsgrad", False)
    return group | {"params": list(names)}


_OWN = {"bias_correction", "step", "ds_keys", "model_parallel", "adamw_mode"}


def _notes(groups: list[dict[str, Any]]) -> list[str]:
    notes = ["DeepSpeed's float32 parameters (fp32.pt) are not read: those of the adapter are used"]
    if any(g.get("weight_decay") and "decoupled_weight_decay" not in g for g in groups):
        notes.append("DeepSpeed's Adam does not save adam_w_mode: weight decay is assumed decoupled")
    return notes


def _common_step(common: dict[str, Any], numbers: list[dict[str, Any]]) -> float | None:
    """The common step of parameters without step.pt (ZeRO-3), if the file has one."""
    inner = common.get("optimizer_state_dict")
    states = inner.get("state") if isinstance(inner, dict) else None
    entries = list(states.values()) if isinstance(states, dict) else []
    found = {
        number(entry["step"], "step in zero/optimizer_state.pt", whole=True)
        for entry in (*entries, *numbers)
        if isinstance(entry, dict) and entry.get("step") is not None
    } - {0.0}  # newer versions leave 0 in the groups and count in the state
    if len(found) > 1:
        raise InputError(f"zero/optimizer_state.pt has steps {some(found)}, expected one: {_AGAIN}")
    return found.pop() if found else None


# Files


class _Ignored:
    """In place of DeepSpeed's objects, which are not used."""

    def __new__(cls, *_: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


_IGNORED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)


def _common(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = _load(path)
    if not isinstance(content, dict):
        raise InputError(f"zero/{path.name} is {type(content).__name__}, expected a dict: {_AGAIN}")
    return content


def _shapes(folder: Path) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of each group, from the model's file of stages 1 and 2, else of stage 3."""
    for pattern in ("mp_rank_00*_model_states.pt", "*zero_pp_rank_0_mp_rank_00_model_states.pt"):
        for path in sorted(folder.glob(pattern)):
            content = _load(path, mmap=True)  # it contains the whole model
            shapes = content.get("param_shapes") if isinstance(content, dict) else None
            if isinstance(shapes, dict):
                shapes = [shapes]
            if isinstance(shapes, list) and shapes and all(isinstance(part, dict) for part in shapes):
                return shapes
            raise InputError(f"{path.name} has no param_shapes, the parameters of each group: {_AGAIN}")
    raise InputError(
        f"{folder.name} has no *_model_states.pt, with the parameters of each group and their shapes: "
        "copy the whole universal folder"
    )


def _load(path: Path, *, mmap: bool = False) -> Any:
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _IGNORED]):
            return load_plain(path, mmap=mmap)
    except InputError as error:
        raise InputError(f"{path.parent.name}/{path.name}: {error}") from error
