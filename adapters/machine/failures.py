"""What is said of an exception after which the work goes on, and what it would keep in memory."""

import traceback

from funcprobe.policy.layout import out_of_memory
from funcprobe.types import InputError

LONGEST = 300  # characters of a reason


def reason_of(error: Exception, *known: type[Exception]) -> str:
    """One line; with the kind of the error where its message does not stand for itself.

    It does for InputError, `known` kinds, and memory that ran out.
    """
    said = " ".join(str(error).split())
    itself = isinstance(error, (InputError, *known)) or out_of_memory(error)
    return (said if itself and said else f"{type(error).__name__}: {said}".rstrip(": "))[:LONGEST]


def free(error: BaseException | None) -> None:
    """Forget the locals of the frames in which it and its causes were raised, large tensors perhaps."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
