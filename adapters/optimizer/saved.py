"""The common result of all importers, and their common checks of values from a file."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from funcprobe.types import InputError

Key: TypeAlias = int | str
"""A position in param_groups, or a parameter's name if the file has names."""
Entry: TypeAlias = dict[str, Any]
"""exp_avg, exp_avg_sq and step of one parameter, as saved, without those that the file lacks."""


class Saved(NamedTuple):
    """An optimizer's state as saved in a file or folder, before it is matched to a model.

    `groups` are param_groups: hyper-parameters under torch.optim's names, and in `params` the keys
    of the group's parameters, in order, each in one group. `state` has no other keys; a parameter
    that never had a gradient is missing there. All keys are positions, or all are names.
    """

    path: Path
    format: str
    groups: list[dict[str, Any]]
    state: dict[Key, Entry]
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> list[Key]:
        """The keys of all groups' parameters, in order."""
        return [key for group in self.groups for key in group["params"]]

    @property
    def by_name(self) -> bool:
        """Whether the keys are names. (A state of no parameters has neither.)"""
        return any(isinstance(key, str) for key in self.keys)


TRAINER, TORCH = "Hugging Face Trainer", "torch.optim"

REMEDY = 'train with torch.optim.AdamW, or set optimizer.rule = "sgd", which needs no optimizer state'

_OTHERS = {  # a key of an optimizer's state -> which optimizer
    "exp_avg_sq_row": "Adafactor",
    "row_var": "Adafactor",
    "momentum_buffer": "SGD with momentum",
    "mu_product": "NAdam",
    "exp_inf": "Adamax",
    "square_avg": "RMSprop or Adadelta",
    "sum": "Adagrad",
}
# Keys of torch.optim.AdamW's groups, of schedulers, and of names that users give their groups.
_GROUP_KEYS = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"}
_GROUP_KEYS |= {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
_GROUP_KEYS |= {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "name"}
_HUGE = 1e300  # a Python integer from a file may be too large for a float


def require_adam(saved: Saved) -> None:
    """InputError unless this is AdamW's state after a step, with the name of the optimizer if known.

    Variants of AdamW have a state of the same form. They are recognised by param_groups without
    `amsgrad`, or with settings that AdamW does not have. Importers of other formats give AdamW's keys.
    """
    groups, keys = saved.groups, set(chain(*saved.state.values()))
    foreign = set(chain(*groups)) - _GROUP_KEYS
    unknown = keys - {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    if not keys:
        found = "no state: it was saved before the first step, or by SGD without momentum"
    elif others := sorted(_OTHERS[key] for key in keys & _OTHERS.keys()):
        found = f"state of {others[0]}"
    elif keys & {"exp_avg", "exp_avg_sq"} == {"exp_avg"}:
        found = "state of Lion (exp_avg without exp_avg_sq)"
    elif unknown or "exp_avg_sq" not in keys:
        found = f"state of an unknown optimizer, with {some(keys)}"
    elif "max_exp_avg_sq" in keys or any(group.get("amsgrad", False) is not False for group in groups):
        found = "amsgrad = True"
    elif any(group.get("maximize", False) is not False for group in groups):
        found = "maximize = True"
    elif not all("amsgrad" in group for group in groups):
        found = "a variant of AdamW (RAdam, LAMB, ...), without amsgrad in its param_groups"
    elif foreign:
        found = f"a variant of AdamW, whose param_groups have {some(foreign)}"
    else:
        return
    raise InputError(f"{found}; expected AdamW's state after a step: {REMEDY}")


def number(
    value: Any, what: str, *, least: float = 0.0, below: float = _HUGE, whole: bool = False
) -> float:
    """A number from a file, as float. Raises InputError unless least <= value < below."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if isinstance(value, np.floating):
        value = float(value)  # numpy 2 would cast the bound to float32, where it is no number
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not least <= value < below or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        bound = f" and below {below:g}" if below < _HUGE else ""
        raise InputError(f"{what} is {value!r:.80}, expected a {kind} of at least {least:g}{bound}")
    return float(value)


def shaped(entry: Entry) -> torch.Tensor | None:
    """A moment, which has the parameter's shape; None if the entry has none."""
    moments = (entry.get("exp_avg"), entry.get("exp_avg_sq"))
    return next((moment for moment in moments if isinstance(moment, torch.Tensor)), None)


def some(names: Iterable[object], most: int = 3) -> str:
    """The first few names, and the number of others."""
    shown = sorted(map(str, names))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(name[:120] for name in shown[:most]) + more


def joined(values: Iterable[object]) -> str:
    """Joined by "and"."""
    return " and ".join(map(str, values))


def located(path: Path, message: object) -> InputError:
    """The error with the file in front, unprintable characters replaced by spaces."""
    return InputError("".join(c if c.isprintable() else " " for c in f"{path}: {message}"))
