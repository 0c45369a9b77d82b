"""The processes of a training that probe a step together: each does a share, all finish or none.

Training goes on after a step that could not be probed, so that no process may be left waiting for one
that has given up. Whatever they exchange therefore begins with a vote, and a process that gives up
casts its own before it leaves.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor, distributed

from funcprobe.ranks import Ranks
from funcprobe.types import InputError

from ..machine.ranks import ranks_of

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # after which a process that does not answer is taken to be gone


class OtherProcessError(RuntimeError):
    """Another process could not go on; the message is its reason."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused  # whether by an InputError


class Together:
    """A group of processes, in which `with together:` ends for all of them alike.

    An exception in one of them becomes `OtherProcessError` in the others, at their next exchange or at
    the end of the block. Without a group the process is alone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)

    @property
    def ranks(self) -> Ranks:
        """For `Forward.ranks`."""
        return Ranks(self.rank, self.size, self._added)

    def gathered(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        self._vote()
        return self._exchanged(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self._vote()
        elif issubclass(kind, Exception) and not issubclass(kind, OtherProcessError):
            reason = " ".join(str(error).split()) or kind.__name__
            # Others' reasons do not matter, nor whether they answer: this process has its own.
            with suppress(RuntimeError):
                self._exchanged((reason, issubclass(kind, InputError)))

    def _added(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes; a GPU's memory may run out before the vote, and after the sum."""
        own = [t.detach().cpu() for t in tensors]
        self._vote()
        totals = own if self.group is None else ranks_of(self.group).add(own)
        return [total.to(t.device) for total, t in zip(totals, tensors, strict=True)]

    def _vote(self) -> None:
        votes: list[Any] = self._exchanged(None)
        for rank, vote in enumerate(votes):
            if vote is not None:
                reason, refused = vote
                raise OtherProcessError(f"process {rank} of {self.size}: {reason}", refused=refused)

    def _exchanged(self, value: T) -> list[T]:
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self.group)
        return found


def several() -> bool:
    """Whether torch.distributed joins this process to others."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def together(before: Together | None = None) -> Together:
    """The processes of this training, which all call this; alone if there is one.

    In a group of their own, so that no exchange meets one of the training's, by gloo. Another one each
    time, since a group in which a process did not answer is of no more use; that of `before` ends.
    """
    if before is not None and before.group is not None:
        with suppress(ValueError, AssertionError):  # the training ended its groups
            distributed.destroy_process_group(before.group)
        before.group = None
    return Together(distributed.new_group(backend="gloo", timeout=PATIENCE) if several() else None)
