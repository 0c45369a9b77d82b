"""What is done beside a training never ends it: any exception there is one warning with its reason."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from funcprobe.types import InputError

from ..machine.failures import free, reason_of
from .together import OtherProcessError

logger = logging.getLogger(__name__)


class Attempt:
    """How a block ended: `reason` is None if it was finished."""

    reason: str | None = None


@contextmanager
def unharmed(lost: str | None = None, *, refuses: bool = False) -> Iterator[Attempt]:
    """A block whose exceptions end it, and nothing else; what its frames held is freed.

    `lost` is what there is not then, for the warning; without it none is given. With `refuses` an
    InputError is raised, also one of another process: before the first step nothing can be lost. What
    is no Exception, as Ctrl-C, is always raised.
    """
    attempt = Attempt()
    try:
        yield attempt
    except Exception as error:
        if refuses and (isinstance(error, InputError) or getattr(error, "refused", False)):
            raise
        attempt.reason = reason_of(error, OtherProcessError)
        logger.debug("%s", lost or "a block beside training failed", exc_info=error)
        free(error)
    if attempt.reason is not None and lost is not None:
        warn(f"{lost}: {attempt.reason}")


def warn(text: str) -> None:
    """A warning; a line of the log where warnings are errors, which would end the training."""
    try:
        warnings.warn(f"funcprobe: {text}", stacklevel=2)
    except Warning as error:
        logger.warning("%s", error)
