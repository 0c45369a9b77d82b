"""verl: `global_step_N/actor/optim_world_size_1_rank_0.pt`, beside the model it was saved with.

It is optimizer.state_dict() of one AdamW over all of FSDP's parameters, frozen ones included, in a
single group with integer keys (source of verl 0.9.1). Its tensors have the parameters' shapes with
use_orig_params = True, are DTensors with FSDP2, and flat with use_orig_params = False, verl's default:
then each LoRA tensor is a unit of its own, row-major and without padding on one process.
`model_world_size_1_rank_0.pt` has the parameters' names and shapes in the optimizer's order.
"""

import re
from pathlib import Path

import torch

from funcprobe.types import InputError

from . import eight_bit, fsdp
from .saved import Entry, Key, Saved, located
from .torch_file import well_formed

_STATE = re.compile(r"optim_world_size_(\d+)_rank_\d+\.pt")
_TRAINED = ("lora_", "modules_to_save.")  # in trainable names under PEFT; others are not named here


def recognises(path: Path) -> bool:
    """Whether the file name is that of verl's optimizer state, for any number of processes."""
    return _STATE.fullmatch(path.name) is not None


def inside(checkpoint: Path) -> list[Path]:
    """The actor's state in `global_step_N`, `actor`, or from a `lora_adapter` folder in one of them.

    Raises InputError if it was saved by several processes.
    """
    folders = [checkpoint, checkpoint / "actor"]
    if checkpoint.name == "lora_adapter" and not any(checkpoint.glob("optimizer*")):
        folders += checkpoint.parents[:2]
    for folder in folders:
        found = sorted(path for path in folder.glob("optim_world_size_*.pt") if recognises(path))
        if whole := [path for path in found if _processes(path) == 1]:
            return whole
        if found:
            raise located(found[0].parent, _sharded(found[0]))
    return []


def read(path: Path) -> Saved:
    """The state, by name if the model's file beside it shows which tensors were trained.

    Raises InputError for one of several shards; for flat tensors whose names and shapes are not in the
    model's file; and if that file has another shape for a tensor.
    """
    if _processes(path) > 1:
        raise InputError(_sharded(path))
    saved = eight_bit.dequantised(well_formed(path, fsdp.load(path), "verl"))
    shapes = [entry.get("exp_avg", entry.get("exp_avg_sq")) for entry in saved.state.values()]
    if saved.by_name or len(saved.groups) != 1 or not shapes:
        return saved
    model = path.with_name(path.name.replace("optim_", "model_", 1))
    trained = _trained(model) if model.is_file() else {}
    flat = all(getattr(moment, "ndim", 0) == 1 for moment in shapes)
    if len(trained) == len(shapes):
        return _named(saved, trained, flat, model.name)
    if flat:
        where = f"{model.name} beside it"
        found = f"{where} has {len(trained)}" if model.is_file() else f"there is no {where}"
        raise InputError(
            f"contains {len(shapes)} flat tensors (use_orig_params = False), expected names and shapes "
            f"of as many LoRA tensors in verl's model, but {found}: give both files as verl saved them"
        )
    return saved


def _named(saved: Saved, trained: dict[str, torch.Size], flat: bool, model: str) -> Saved:
    """The state with the model's names in place of positions, without positions that have no state."""
    state: dict[Key, Entry] = {}
    for (key, entry), (name, shape) in zip(saved.state.items(), trained.items(), strict=True):
        state[name] = dict(entry)
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = entry.get(kind)
            if not isinstance(moment, torch.Tensor):
                continue
            found = moment.shape
            if found != (torch.Size([shape.numel()]) if flat else shape):
                raise InputError(
                    f"{kind} of {name} (position {key}) has shape {tuple(found)}, the parameter in "
                    f"{model} has {tuple(shape)}: one of the two belongs to another checkpoint or is "
                    "damaged"
                )
            state[name][kind] = moment.reshape(shape)
    group = saved.groups[0] | {"params": list(state)}
    note = f"names are those of {model}, in its order"
    return saved._replace(groups=[group], state=state, notes=(*saved.notes, note))


def _trained(model: Path) -> dict[str, torch.Size]:
    """Name -> shape of the adapter's tensors, in the model's order. Their values are not read."""
    try:
        content = fsdp.load(model, mmap=True)
    except InputError as error:
        raise InputError(f"{model.name} beside it: {error}") from error.__cause__
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise InputError(f"{model.name} beside it is not a model's state: copy it again")
    return {n: t.shape for n, t in content.items() if any(part in n for part in _TRAINED)}


def _processes(path: Path) -> int:
    found = _STATE.fullmatch(path.name)
    return int(found[1]) if found else 1


def _sharded(path: Path) -> str:
    count = _processes(path)
    return (
        f"verl's optimizer state is in {count} shards (optim_world_size_{count}_rank_*.pt), expected "
        "one: train on one GPU, or save inside the run what torch's get_optimizer_state_dict(model, "
        "optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) returns"
    )
