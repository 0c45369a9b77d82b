"""The file Adam's state lies in: found, read as data from strangers, and known to be AdamW's."""

import pickle
import re
import struct
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from funcprobe.types import InputError

Groups: TypeAlias = list[dict[str, Any]]
Entries: TypeAlias = list[dict[str, Any]]
"""One for each position in the groups, {} where the file has none."""

EXPECTED = "expected what torch.save(optimizer.state_dict()) writes"

_OTHERS = {  # a key of an optimizer's state -> which optimizer
    "__bnb_optimizer_quant_state__": "bitsandbytes (not supported yet)",
    "state1": "bitsandbytes (not supported yet)",
    "exp_avg_sq_row": "Adafactor",
    "row_var": "Adafactor",
    "momentum_buffer": "SGD with momentum",
    "mu_product": "NAdam",
    "exp_inf": "Adamax",
    "square_avg": "RMSprop or Adadelta",
    "sum": "Adagrad",
}
_HUGE = 1e300  # a Python integer from a file may be too large for a float
_REMEDY = 'train with torch.optim.AdamW, or set rule = "sgd", which needs no optimizer state'


def find_optimizer_file(checkpoint: Path) -> Path:
    """`optimizer.pt` in a Trainer's checkpoint folder.

    Raises InputError where there is none, with why that happens and what to set.
    """
    if (path := checkpoint / "optimizer.pt").is_file():
        return path
    inside = sorted(checkpoint.glob("checkpoint-*/optimizer.pt"), key=lambda p: p.stat().st_mtime)
    why = (
        "none is written under save_only_model = True, nor by save_model(); train with "
        "save_only_model = False and give a checkpoint-N folder, or set "
        'rule = "sgd", which needs no optimizer state'
    )
    if inside:
        why = f"give {inside[-1].parent.name}, which holds one"
    elif not checkpoint.is_dir():
        why = "it is not a folder; give a trainer's checkpoint folder"
    raise located(checkpoint, f"no optimizer.pt: {why}")


def load_entries(path: Path) -> tuple[Groups, Entries]:
    """param_groups and the state of each position, of a file that is AdamW's.

    Raises InputError for a file that is no plain torch checkpoint, for another optimizer, amsgrad
    and maximize. Nothing in the file is run: `torch.load(weights_only=True)`.
    """
    groups, state = _entries(_load(path))
    _require_adam(groups, state)
    return groups, state


def number(
    value: Any, what: str, *, least: float = 0.0, below: float = _HUGE, whole: bool = False
) -> float:
    """A number from a file, as float. Raises InputError unless least <= value < below."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    known = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not known or not least <= value < below or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        bound = f" and below {below:g}" if below < _HUGE else ""
        raise InputError(f"{what} is {value!r:.80}, expected a {kind} from {least:g}{bound}")
    return float(value)


def some(names: Iterable[object], most: int = 3) -> str:
    """The first few, and how many more."""
    shown = sorted(map(str, names))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(name[:120] for name in shown[:most]) + more


def located(path: Path, message: object) -> InputError:
    """The error with the file before it, and nothing a terminal could choke on."""
    return InputError("".join(c if c.isprintable() else " " for c in f"{path}: {message}"))


def _load(path: Path) -> dict[str, Any]:
    scalar = np.float64(0).__reduce__()[0]  # how numpy pickles a learning rate computed with it
    allowed: list[Any] = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            saved = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL (\S+)", str(error))
        why = f"asks for {wants[1]:.80}, only tensors and numbers are read" if wants else "is damaged"
        raise InputError(f"no plain torch checkpoint: it {why}; {EXPECTED}") from error
    # What damaged bytes raise in torch's unpickler, its zip reader and its legacy reader (2.13).
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"damaged, or no torch checkpoint; {EXPECTED}") from error
    except (EOFError, AssertionError, struct.error, OverflowError, MemoryError) as error:
        raise InputError("empty or cut short: copy it again") from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        kind = (
            f"a dict of {some(saved) or 'nothing'}" if isinstance(saved, dict) else type(saved).__name__
        )
        raise InputError(f"holds {kind}, without state and param_groups; {EXPECTED}")
    return saved


def _entries(saved: dict[str, Any]) -> tuple[Groups, Entries]:
    groups, state = saved["param_groups"], saved["state"]
    well_formed = (
        isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and isinstance(state, dict)
        and all(isinstance(entry, dict) for entry in state.values())
    )
    if not well_formed:
        raise InputError(f"state or param_groups are of another form; {EXPECTED}")
    if state.keys() & _OTHERS.keys():
        return groups, [state]
    ids = [i for group in groups for i in group["params"]]
    if not all(type(i) is int for i in ids) or len(set(ids)) < len(ids) or state.keys() - set(ids):
        raise InputError(f"positions in param_groups and in state do not match; {EXPECTED}")
    return groups, [state.get(i, {}) for i in ids]


def _require_adam(groups: Groups, state: Entries) -> None:
    keys = set(chain(*state))
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
        # RAdam's and LAMB's state has AdamW's keys; of them only Adam and AdamW write amsgrad.
        found = "a relative of AdamW (RAdam, LAMB, ...), without amsgrad in its param_groups"
    else:
        return
    raise InputError(f"{found}; expected AdamW's state after a step: {_REMEDY}")
