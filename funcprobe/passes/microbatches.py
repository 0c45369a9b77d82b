"""A pass over a batch: one microbatch after another, and their results as one of the whole batch.

Of several processes (`Forward.ranks`) each has microbatches of its own; what is summed over them is
added once a pass.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..autodiff.transforms import in_transform
from ..policy.forward import Forward
from ..policy.layout import (
    Layout,
    grouped,
    microbatches,
    out_of_memory,
    response_mask,
    scatter,
    select,
)
from ..policy.rows import Rows
from ..ranks import Ranks, most_loaded, refuse_several, shares
from ..types import Batch

T = TypeVar("T")

SMALL = 256  # tokens below which microbatches are not cut finer for the sake of balance
CUTS = 4  # ways to cut them that are compared


def in_microbatches(
    compute: Callable[[Rows], T],
    batch: Batch,
    max_tokens: int,
    forward: Forward,
    layout: Layout | None = None,
    smaller: Callable[[], Callable[[Rows], T] | None] | None = None,
) -> Iterator[tuple[Rows, T]]:
    """(rows, compute(rows)) of every microbatch, one after another; `layout`: by default the forward's.

    Of several processes each has its own ones, some possibly none: what the caller makes of them is to
    be added over `forward.ranks`. If memory runs out, the microbatch is halved, `forward.halved` is
    called with the new bound, and no later microbatch is larger. If it runs out on a single sequence,
    `smaller()`, the same with less memory, is computed for it and for all after it, and
    `forward.recomputing` is called; if that is None, or runs out as well, the error is raised.
    """
    # `compute` may already be what smaller() would be.
    smallest = forward.recompute or smaller is None
    layout = forward.layout if layout is None else layout
    waiting = _own(batch, max_tokens, layout, forward.ranks)
    while waiting:
        rows, *waiting = waiting
        alone = len(rows.sequence_T.unique()) == 1
        out = _unless_out_of_memory(compute, rows, last=alone and smallest)
        if out is not None:
            yield rows, out[0]
            continue
        if alone and smaller is not None:
            waiting, smallest, other = [rows, *waiting], True, smaller()
            if other is not None:
                compute = other
                forward.recomputing()
            continue
        length_N = batch.prompt_length_N + batch.response_length_N
        # The failed microbatch separately, as a later sequence may be longer than half of it.
        own_N = rows.sequence_T.unique()
        bound = max(rows.tokens // 2, int(length_N[own_N].max()))
        again = _of_sequences(batch, own_N, bound, layout)
        if waiting:
            left_N = torch.cat([r.sequence_T for r in waiting]).unique()
            bound = max(bound, int(length_N[left_N].max()))
            again += _of_sequences(batch, left_N, bound, layout)
        waiting = again
        forward.halved(bound)


def per_token(
    compute: Callable[[Rows], tuple[Tensor, ...]], batch: Batch, max_tokens: int, forward: Forward
) -> list[Float[Tensor, "N R"]]:
    """The per-token results of compute(rows) over all microbatches, each as [N, R] in float64.

    Of several processes each fills in its own entries, which are added once. InputError if there are
    several and a surrounding transform, or autograd, differentiates the results.
    """
    found = list(in_microbatches(compute, batch, max_tokens, forward))
    if forward.ranks.size == 1:
        parts, outs = zip(*found, strict=True)
        return [scatter(values, parts, batch) for values in zip(*outs, strict=True)]
    # A rank without microbatches computes the smallest one, to know how many results there are.
    idle = not found
    if idle:
        rows = min(microbatches(batch, max_tokens, forward.layout), key=lambda rows: rows.tokens)
        found = [(rows, compute(rows))]
    parts, outs = zip(*found, strict=True)
    if any(in_transform(x) or x.requires_grad for x in outs[0]):
        refuse_several(forward.ranks)
    mask_NR = response_mask(batch)
    own_KNR = torch.stack([scatter(values, parts, batch) for values in zip(*outs, strict=True)])
    own_KT = own_KNR[:, mask_NR]
    (flat_KT,) = forward.ranks.add([torch.zeros_like(own_KT) if idle else own_KT])
    whole_KNR = torch.zeros_like(own_KNR)
    whole_KNR[:, mask_NR] = flat_KT
    return list(whole_KNR)


def _own(batch: Batch, max_tokens: int, layout: Layout, ranks: Ranks) -> list[Rows]:
    """The microbatches of this rank, in the order of the plan that all ranks make.

    Of several bounds on their tokens the one by which the most loaded rank has least: shares of all
    tokens, so that every rank has some, if there are as many sequences.
    """
    if ranks.size == 1:
        return microbatches(batch, max_tokens, layout)
    longest = int((batch.prompt_length_N + batch.response_length_N).max())
    best = grouped(batch, max_tokens, layout)
    least = most_loaded(best.tokens, ranks.size)
    a_rank = sum(best.tokens) / ranks.size
    fewest = math.ceil(a_rank / max_tokens)
    for count in range(fewest, fewest + CUTS):
        bound = max(longest, math.ceil(a_rank / count))
        finer = grouped(batch, min(bound, max_tokens), layout)
        if (load := most_loaded(finer.tokens, ranks.size)) < least:
            best, least = finer, load
        if bound < max(SMALL, longest + 1):
            break
    return [best.build(batch, best.parts[i]) for i in shares(best.tokens, ranks.size)[ranks.rank]]


def _of_sequences(
    batch: Batch, index_N: Int[Tensor, " n"], max_tokens: int, layout: Layout
) -> list[Rows]:
    """Microbatches of a subset of the sequences; `sequence_T` keeps their indices in the batch."""
    parts = microbatches(select(batch, index_N), max_tokens, layout)
    return [rows._replace(sequence_T=index_N[rows.sequence_T]) for rows in parts]


def _unless_out_of_memory(compute: Callable[[Rows], T], rows: Rows, *, last: bool) -> tuple[T] | None:
    """(compute(rows),), or None if memory ran out; the error, if this was the last attempt."""
    try:
        return (compute(rows),)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or last:
            raise
    return None  # outside the handler, where the error and the tensors of its frames are freed
