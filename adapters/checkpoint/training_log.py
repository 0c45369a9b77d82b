"""log_history of trainer_state.json: what the Trainer, or TRL, logged at each step."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe.types import InputError

from .. import strict_json
from .trainer_state import FILE

LARGEST = 10**12  # of a step, far beyond any training


class Entry(NamedTuple):
    """What one entry has; None: not there, or no finite number."""

    step: int
    entropy: float | None
    learning_rate: float | None


class TrainingLog(NamedTuple):
    """The entries in the order of their steps, each step once."""

    file: Path
    entries: tuple[Entry, ...]
    left_out: int  # entries whose entropy is no finite number

    @property
    def has_entropy(self) -> bool:
        """Whether any entry has one."""
        return any(entry.entropy is not None for entry in self.entries)


def training_log(place: Path) -> TrainingLog | None:
    """Of a file, or of a checkpoint's folder; None if that has none. InputError if it is damaged."""
    file = place / FILE if place.is_dir() else place
    if not file.is_file():
        return None
    try:
        found = strict_json.parse(file.read_text(encoding="utf-8"), nan=True)
        history = found["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} has no log_history ({type(error).__name__}): give a trainer_state.json, as the "
            "Trainer saves it in a checkpoint"
        ) from error
    if not isinstance(history, list):
        raise InputError(f"{file}: log_history is a {type(history).__name__}, a list is expected")
    entries: dict[int, Entry] = {}
    left_out = 0
    for each in history:
        step = each.get("step") if isinstance(each, dict) else None
        if type(step) is not int or not 0 < step < LARGEST:
            continue
        entropy = _number(each.get("entropy"))
        left_out += "entropy" in each and entropy is None
        before = entries.get(step)
        if before is None or before.entropy is None:  # evaluation has an entry of its own
            entries[step] = Entry(step, entropy, _number(each.get("learning_rate")))
    return TrainingLog(file, tuple(entries[step] for step in sorted(entries)), left_out)


def _number(value: Any) -> float | None:
    if type(value) not in (int, float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None
