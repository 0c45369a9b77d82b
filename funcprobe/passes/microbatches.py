"""A pass over a batch: one microbatch after another, and their results as one of the whole batch."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..policy.forward import Forward
from ..policy.layout import Layout, microbatches, out_of_memory, scatter, select
from ..policy.rows import Rows
from ..types import Batch

T = TypeVar("T")


def in_microbatches(
    compute: Callable[[Rows], T],
    batch: Batch,
    max_tokens: int,
    forward: Forward,
    layout: Layout | None = None,
) -> Iterator[tuple[Rows, T]]:
    """(rows, compute(rows)) of every microbatch, one after another; `layout`: by default the forward's.

    If memory runs out, the microbatch is halved, `forward.halved` is called with the new bound, and no
    later microbatch is larger. If it runs out on a single sequence, the error is raised.
    """
    layout = forward.layout if layout is None else layout
    waiting = microbatches(batch, max_tokens, layout)
    while waiting:
        rows, *waiting = waiting
        out = _unless_out_of_memory(compute, rows)
        if out is not None:
            yield rows, out[0]
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
    """The per-token results of compute(rows) over all microbatches, each as [N, R] in float64."""
    parts, outs = zip(*in_microbatches(compute, batch, max_tokens, forward), strict=True)
    return [scatter(values, parts, batch) for values in zip(*outs, strict=True)]


def _of_sequences(
    batch: Batch, index_N: Int[Tensor, " n"], max_tokens: int, layout: Layout
) -> list[Rows]:
    """Microbatches of a subset of the sequences; `sequence_T` keeps their indices in the batch."""
    parts = microbatches(select(batch, index_N), max_tokens, layout)
    return [rows._replace(sequence_T=index_N[rows.sequence_T]) for rows in parts]


def _unless_out_of_memory(compute: Callable[[Rows], T], rows: Rows) -> tuple[T] | None:
    """(compute(rows),), or None if memory ran out on more than one sequence."""
    try:
        return (compute(rows),)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(rows.sequence_T.unique()) == 1:
            raise
    return None  # outside the handler, where the error and the tensors of its frames are freed
