"""trainer_state.json, as transformers' Trainer leaves it in a checkpoint: how many steps were taken."""

import json
from pathlib import Path

from funcprobe.types import InputError

FILE = "trainer_state.json"


def trained_steps(checkpoint: Path) -> int | None:
    """Its global_step; None where the folder has no such file. InputError where it has none to read."""
    file = checkpoint / FILE
    if not file.is_file():
        return None
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file} has no global_step ({type(error).__name__}): mend or delete it"
        ) from error
