"""A warning where the trained model has dropout, whose masks no other program can draw again."""

import warnings
from typing import Any

from funcprobe.policy.dropout import dropouts, listed

from .live import policy_of

OF_STEP = (
    "each predicted step is by the trainer's own gradient, masks included, which no probe of its "
    "checkpoint can repeat; the entropy is that of the policy without dropout"
)


def warn_of_dropout(model: Any, consequence: str) -> None:
    """One line that names the dropout, if there is any, and what follows from it."""
    if found := dropouts(policy_of(model)):
        warnings.warn(f"funcprobe: dropout in training ({listed(found)}): {consequence}", stacklevel=3)
