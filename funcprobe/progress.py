"""What a pass has so far, for its caller to keep, so that an interrupted one ends with the same bits.

The core only says what there is after each microbatch; when that is stored, and where, is the caller's
affair.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class SoFar(NamedTuple):
    """A pass after some of its microbatches: what it takes to compute the others alone."""

    counts: tuple[int, ...]  # of microbatches; the pass knows of which
    tensors: list[Tensor]  # its running results


def alike(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether they are as many, of the same shapes and dtypes; devices may differ."""
    own, other = ([(x.shape, x.dtype) for x in one] for one in (tensors, expected))
    return own == other


class Kept(Protocol):
    """What is kept of one pass."""

    @property
    def so_far(self) -> SoFar | None:
        """Of an interrupted pass with the same plan; None: it begins."""
        ...

    def keep(self, counts: Sequence[int], tensors: Callable[[], Sequence[Tensor]]) -> None:
        """Called after each microbatch; `tensors` may be called later, and gives the same then."""
        ...


class Progress(Protocol):
    """What is kept of a computation: one pass after another, in the same order whenever it is made."""

    def begin(self, plan: Sequence[int], fits: Callable[[SoFar], bool]) -> Kept:
        """The next pass; `plan` are numbers without which what is kept of it is of no use.

        Nor is what does not fit: other counts, shapes or dtypes than a pass with this plan has.
        """
        ...


class _Nothing(NamedTuple):
    so_far: SoFar | None = None

    def begin(self, plan: Sequence[int], fits: Callable[[SoFar], bool]) -> Kept:  # noqa: ARG002
        return self

    def keep(self, counts: Sequence[int], tensors: Callable[[], Sequence[Tensor]]) -> None: ...


NOTHING_KEPT: Progress = _Nothing()
