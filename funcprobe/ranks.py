"""Several processes that run the same program and share its passes: who this one is, and their sums."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .types import InputError, Params


class Ranks(NamedTuple):
    """Rank r of `size` processes with equal parameters, batches and settings; each calls all functions.

    add(tensors_r) is sum_r tensors_r, entry by entry, the same on every rank: in rank order, so that it
    is bit-identical from run to run; on the devices of its arguments. Shapes and dtypes are equal on
    all ranks, and each rank makes the same calls in the same order.
    """

    rank: int
    size: int
    add: Callable[[Sequence[Tensor]], list[Tensor]]


ALONE = Ranks(0, 1, list)


def added(part: Params, ranks: Ranks) -> Params:
    """sum_r part_r by name, of one call of `ranks.add`."""
    if ranks.size == 1:
        return part
    names = sorted(part)
    return dict(zip(names, ranks.add([part[n] for n in names]), strict=True))


def refuse_several(ranks: Ranks) -> None:
    """InputError if a result that is to be differentiated would be a sum over processes."""
    if ranks.size > 1:
        raise InputError(
            f"token statistics that are differentiated would be sums over {ranks.size} processes, "
            "through which no derivative passes: use one process, or the derivatives of this package"
        )


def shares(tokens: Sequence[int], size: int) -> list[list[int]]:
    """Microbatches of so many tokens by rank: the longest first, each to the least loaded rank.

    Ties go to the earlier microbatch and the lower rank; a rank's own are in ascending order.
    """
    load, own = [0] * size, [list[int]() for _ in range(size)]
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        rank = load.index(min(load))
        load[rank] += tokens[i]
        own[rank].append(i)
    return [sorted(each) for each in own]


def most_loaded(tokens: Sequence[int], size: int) -> int:
    """Tokens of the rank that has most by `shares`."""
    return max(sum(tokens[i] for i in own) for own in shares(tokens, size))
