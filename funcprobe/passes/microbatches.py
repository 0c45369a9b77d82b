"""A pass over a batch: one microbatch after another, and their results as one of the whole batch.

Of several processes (`Forward.ranks`) each has microbatches of its own; what is summed over them is
added once a pass.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
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
from ..progress import SoFar, alike
from ..ranks import Ranks, most_loaded, refuse_several, shares
from ..types import Batch

T = TypeVar("T")

SMALL = 256  # tokens below which microbatches are not cut finer for the sake of balance
WIDE = (torch.float32, torch.float64)  # of what is computed of a token
CUTS = 4  # ways to cut them that are compared


def over_microbatches(
    compute: Callable[[Rows], T],
    add: Callable[[list[Tensor], Rows, T], list[Tensor]],
    start: list[Tensor],
    batch: Batch,
    max_tokens: int,
    forward: Forward,
    layout: Layout | None = None,
    smaller: Callable[[], Callable[[Rows], T] | None] | None = None,
    columns: int = 0,
) -> tuple[list[Tensor], list[Rows]]:
    """add(... add(add(start, rows, compute(rows)), ...)) over the microbatches, and these, in order.

    `add` writes into none of its arguments. `layout`: by default the forward's. Of several processes
    each has its own microbatches, some possibly none: what the caller makes of them is to be added over
    `forward.ranks`. If memory runs out, the microbatch is halved, `forward.halved` is called with the
    new bound, and no later microbatch is larger. If it runs out on a single sequence, `smaller()`, the
    same with less memory, is computed for it and for all after it, and `forward.recomputing` is called;
    if that is None, or runs out as well, the error is raised. `columns`: without a start, `add` makes
    as many, with an entry for every token of the microbatches, in float32 or float64.

    What `forward.progress` has of this pass is taken for the first microbatches, which are cut as they
    were then: memory counts as out where it was, so that the sum is the uninterrupted one to the bit.
    """
    # `compute` may already be what smaller() would be.
    smallest = forward.recompute or smaller is None
    layout = forward.layout if layout is None else layout
    planned = waiting = own_microbatches(batch, max_tokens, layout, forward.ranks)
    plan = (max_tokens, int(smallest), forward.ranks.rank, forward.ranks.size)

    def fits(so_far: SoFar) -> bool:
        known = replayed(so_far.counts, planned, batch, layout, repeats=smaller is not None)
        if known is None or start:
            return known is not None and alike(so_far.tensors, start)
        shape = (sum(len(rows.k_T) for rows in known),)
        wide = all(x.shape == shape and x.dtype in WIDE for x in so_far.tensors)
        return len(so_far.tensors) == columns and wide

    kept = forward.progress.begin((*plan, *(rows.tokens for rows in waiting)), fits)
    state, done, (known, *ran_out) = start, list[Rows](), (0,)
    if kept.so_far is not None:
        known, *ran_out = kept.so_far.counts
        state = _like(start, kept.so_far.tensors)
    before = tuple(ran_out)  # the microbatches before which memory ran out, as often as it did
    while waiting:
        rows, *waiting = waiting
        alone = len(rows.sequence_T.unique()) == 1
        out = None
        if ran_out and ran_out[0] == len(done):
            del ran_out[0]
        elif len(done) < known:
            done.append(rows)
            continue
        else:
            out = _unless_out_of_memory(compute, rows, last=alone and smallest)
            if out is None:
                before = (*before, len(done))
        if out is not None:
            state = add(state, rows, out[0])
            done.append(rows)
            kept.keep((len(done), *before), partial(list, state))
            continue
        if alone and smaller is not None:
            waiting, smallest, other = [rows, *waiting], True, smaller()
            if other is not None:
                compute = other
                forward.recomputing()
            continue
        waiting, bound = _halved(rows, waiting, batch, layout)
        forward.halved(bound)
    return state, done


def replayed(
    counts: Sequence[int], waiting: list[Rows], batch: Batch, layout: Layout, *, repeats: bool
) -> list[Rows] | None:
    """The microbatches after which a pass has these counts; None if it never has.

    `repeats`: a single sequence that did not fit is computed again, as with `smaller`.
    """
    known, *ran_out = counts or (0,)
    done = list[Rows]()
    while len(done) < known and waiting:
        rows, *waiting = waiting
        if ran_out[:1] != [len(done)]:
            done.append(rows)
            continue
        del ran_out[0]
        if len(rows.sequence_T.unique()) > 1:
            waiting, _ = _halved(rows, waiting, batch, layout)
        elif repeats:
            waiting = [rows, *waiting]
        else:
            return None
    return done if 0 < len(done) == known and not ran_out else None


def _halved(rows: Rows, waiting: list[Rows], batch: Batch, layout: Layout) -> tuple[list[Rows], int]:
    """Microbatches, the first of which did not fit into memory, cut finer; the bound on tokens."""
    length_N = batch.prompt_length_N + batch.response_length_N
    # The failed microbatch separately, as a later sequence may be longer than half of it.
    own_N = rows.sequence_T.unique()
    bound = max(rows.tokens // 2, int(length_N[own_N].max()))
    again = _of_sequences(batch, own_N, bound, layout)
    if waiting:
        left_N = torch.cat([r.sequence_T for r in waiting]).unique()
        bound = max(bound, int(length_N[left_N].max()))
        again += _of_sequences(batch, left_N, bound, layout)
    return again, bound


def per_token(
    compute: Callable[[Rows], tuple[Tensor, ...]],
    columns: int,
    batch: Batch,
    max_tokens: int,
    forward: Forward,
) -> list[Float[Tensor, "N R"]]:
    """The `columns` per-token results of compute(rows) over all microbatches, as [N, R] in float64.

    Of several processes each fills in its own entries, which are added once. InputError if there are
    several and a surrounding transform, or autograd, differentiates the results.
    """
    flat_KT, parts = over_microbatches(
        compute, _appended, [], batch, max_tokens, forward, columns=columns
    )
    if forward.ranks.size == 1:
        return [scatter([values_T], parts, batch) for values_T in flat_KT]
    # A rank without microbatches computes the smallest one, to know how many results there are.
    idle = not parts
    if idle:
        rows = min(microbatches(batch, max_tokens, forward.layout), key=lambda rows: rows.tokens)
        parts, flat_KT = [rows], list(compute(rows))
    if any(in_transform(x) or x.requires_grad for x in flat_KT):
        refuse_several(forward.ranks)
    mask_NR = response_mask(batch)
    own_KNR = torch.stack([scatter([values_T], parts, batch) for values_T in flat_KT])
    own_KT = own_KNR[:, mask_NR]
    (flat,) = forward.ranks.add([torch.zeros_like(own_KT) if idle else own_KT])
    whole_KNR = torch.zeros_like(own_KNR)
    whole_KNR[:, mask_NR] = flat
    return list(whole_KNR)


def _appended(flat_KT: list[Tensor], _: Rows, found: tuple[Tensor, ...]) -> list[Tensor]:
    """The results of the tokens so far, on the device of the latest."""
    if not flat_KT:
        return list(found)
    pairs = zip(flat_KT, found, strict=True)
    return [torch.cat([values_T.to(latest.device), latest]) for values_T, latest in pairs]


def _like(start: list[Tensor], found: list[Tensor]) -> list[Tensor]:
    """What was kept, on the devices on which it is added to."""
    if not start:
        return found
    return [x.to(first.device) for first, x in zip(start, found, strict=True)]


def own_microbatches(batch: Batch, max_tokens: int, layout: Layout, ranks: Ranks) -> list[Rows]:
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
