"""trainer_state.json, saved by transformers' Trainer in a checkpoint: the number of steps taken."""

from pathlib import Path

from funcprobe.types import InputError

from .. import strict_json

FILE = "trainer_state.json"


def trained_steps(checkpoint: Path) -> int | None:
    """Its global_step; None if the folder has no such file. InputError if it cannot be read."""
    file = checkpoint / FILE
    if not file.is_file():
        return None
    try:
        # The Trainer writes a loss or gradient norm of NaN into its log as such.
        return int(strict_json.parse(file.read_text(encoding="utf-8"), nan=True)["global_step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(
            f"{file} has no global_step ({type(error).__name__}): correct or delete it"
        ) from error
