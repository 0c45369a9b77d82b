"""Several ranks of one program in one process, in turn: no threads, no sockets."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from funcprobe.ranks import Ranks


class _WaitingError(Exception):
    """The sum of this call is not known before every rank has called."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = [x.detach().clone() for x in given]


def in_turn(size: int, program: Callable[[Ranks], Any]) -> list[Any]:
    """[program(ranks) of every rank], each started again until the sums that it asks for are known."""
    sums: list[list[Tensor]] = []
    while True:
        given: list[list[Tensor]] = []
        done: list[Any] = []
        for rank in range(size):
            known = iter(sums)

            def add(tensors: Sequence[Tensor], known: Any = known) -> list[Tensor]:
                found = next(known, None)
                if found is None:
                    raise _WaitingError(tensors)
                return [x.clone() for x in found]

            try:
                done.append(program(Ranks(rank, size, add)))
            except _WaitingError as waiting:
                given.append(waiting.given)
            else:
                assert next(known, None) is None, "a rank asked for fewer sums than another"
        if not given:
            return done
        assert not done, "a rank was done while others waited"
        assert len({tuple((x.shape, x.dtype) for x in one) for one in given}) == 1
        sums.append([sum(parts[1:], parts[0]) for parts in zip(*given, strict=True)])
