"""What is kept of passes, in memory, and an end after any microbatch, as if by a signal."""

from collections.abc import Callable, Sequence

from torch import Tensor

from funcprobe.progress import Kept, SoFar


class KilledError(Exception):
    """Where the process would have ended."""


class InMemory:
    """`Progress`: keeps after every microbatch, and ends after so many of them; None: does not."""

    def __init__(self, ends_after: int | None = None, before: "InMemory | None" = None) -> None:
        self.left = ends_after
        self.stored: dict[int, tuple[list[int], SoFar]] = {} if before is None else dict(before.stored)
        self.history: list[InMemory] = []  # as it was after every microbatch
        self.begun = self.kept = 0
        self.fits: dict[int, Callable[[SoFar], bool]] = {}

    def begin(self, plan: Sequence[int], fits: Callable[[SoFar], bool]) -> Kept:
        number, self.begun = self.begun, self.begun + 1
        found = self.stored.get(number)
        assert found is None or found[0] == list(plan)
        self.fits[number] = fits
        assert found is None or fits(found[1])
        return OfPass(self, number, list(plan), None if found is None else found[1])


class OfPass:
    def __init__(self, own: InMemory, number: int, plan: list[int], so_far: SoFar | None) -> None:
        self.own, self.number, self.plan, self.so_far = own, number, plan, so_far

    def keep(self, counts: Sequence[int], tensors: Callable[[], Sequence[Tensor]]) -> None:
        kept = SoFar(tuple(counts), [x.detach().clone() for x in tensors()])
        self.own.stored[self.number] = (self.plan, kept)
        self.own.kept += 1
        self.own.history.append(InMemory(None, self.own))
        if self.own.left is not None and self.own.kept == self.own.left:
            raise KilledError
