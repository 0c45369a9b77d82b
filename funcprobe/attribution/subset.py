"""Part of a batch by the names of prompts or sequences, or by a mask of tokens."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..policy.layout import response_mask, select
from ..types import Batch, InputError, UpdateBatch

Unit: TypeAlias = Literal["prompt", "sequence"]
"""What the parts of a batch are: prompts, by `Batch.prompt_N`, or sequences, by their row."""


def subset(
    update: UpdateBatch,
    *,
    prompts: Sequence[int] = (),
    sequences: Sequence[int] = (),
    tokens_NR: Bool[Tensor, "N R"] | None = None,
) -> UpdateBatch:
    """The part of J that some of U's tokens are: all rows of U, the coefficients of other tokens 0.

    `prompts` by their index in `Batch.prompt_N`, `sequences` by their row, `tokens_NR` a mask; their
    union counts. Coefficients keep the divisors of the whole of U, so that parts without a token in
    common add up to J. `normaliser_N` (and `entropy_normaliser_N`) is U's for sequences that are in the
    part with all their tokens, else 0. Raises InputError for a prompt or sequence that U does not have,
    a mask of another shape, and an empty part.
    """
    mask_NR = response_mask(update.batch)
    chosen_NR = torch.zeros_like(mask_NR)
    by_unit: dict[Unit, Sequence[int]] = {"prompt": prompts, "sequence": sequences}
    for unit, names in by_unit.items():
        if len(names):
            own_N, found = of_unit(update.batch, unit), named(update.batch, unit, names, "U")
            chosen_NR = chosen_NR | torch.isin(own_N, found)[:, None]
    if tokens_NR is not None:
        if tokens_NR.shape != mask_NR.shape or tokens_NR.dtype != torch.bool:
            raise InputError(
                f"tokens_NR is {tokens_NR.dtype} of shape {tuple(tokens_NR.shape)}: a boolean mask of "
                f"U's response tokens, {tuple(mask_NR.shape)}, is expected"
            )
        chosen_NR = chosen_NR | tokens_NR
    chosen_NR = chosen_NR & mask_NR
    if not bool(chosen_NR.any()):
        raise InputError("no token of U is chosen: name a prompt or a sequence of U, or tokens")
    whole_N = (chosen_NR | ~mask_NR).all(1)
    d_NR, d_normaliser_N = update.entropy_coef_NR, update.entropy_normaliser_N
    return UpdateBatch(
        update.batch,
        update.coef_NR * chosen_NR,
        None if update.normaliser_N is None else update.normaliser_N * whole_N,
        None if d_NR is None else d_NR * chosen_NR,
        None if d_normaliser_N is None else d_normaliser_N * whole_N,
    )


def moving_rows(update: UpdateBatch) -> UpdateBatch:
    """The sequences of U that have a coefficient, in their order: J and its gradient are the same.

    Their index in the batch is another, and with it the masks of dropout that are drawn by it.
    """
    rows_n = moves(update).nonzero()[:, 0]
    batch = select(update.batch, rows_n)
    width = response_mask(batch).shape[1] if len(rows_n) else 0
    c_NR, normaliser_N, d_NR, d_normaliser_N = update[1:]
    return UpdateBatch(
        batch,
        c_NR[rows_n, :width],
        None if normaliser_N is None else normaliser_N[rows_n],
        None if d_NR is None else d_NR[rows_n, :width],
        None if d_normaliser_N is None else d_normaliser_N[rows_n],
    )


def moves(update: UpdateBatch) -> Bool[Tensor, " N"]:
    """Whether a sequence has a coefficient that is not 0."""
    c_NR, d_NR = update.coef_NR, update.entropy_coef_NR
    return ((c_NR != 0) if d_NR is None else (c_NR != 0) | (d_NR != 0)).any(1)


def of_unit(batch: Batch, unit: Unit) -> Int[Tensor, " N"]:
    """The prompt's index, or the row, of every sequence. InputError for another unit."""
    if unit == "prompt":
        return batch.prompt_N
    if unit == "sequence":
        return torch.arange(len(batch.prompt_N))
    raise InputError(f'unknown unit {unit!r}: "prompt" or "sequence" is expected')


def named(batch: Batch, unit: Unit, names: Sequence[int], of: str) -> Int[Tensor, " M"]:
    """Names of prompts or sequences as indices. InputError for none, one unknown, one named twice."""
    known = of_unit(batch, unit).unique()
    found = torch.tensor(list(names), dtype=torch.int64)
    if not len(found):
        raise InputError(f"no {unit} of {of} is named: name at least one of its {len(known)}")
    if not bool(torch.isin(found, known).all()):
        unknown = int(found[~torch.isin(found, known)][0])
        some = ", ".join(map(str, known[:5].tolist())) + (", ..." if len(known) > 5 else "")
        raise InputError(
            f"{unit} {unknown} is not in {of}: one of its {len(known)} is expected ({some})"
        )
    values, counts = found.unique(return_counts=True)
    if len(values) < len(found):
        raise InputError(f"{unit} {int(values[counts > 1][0])} of {of} is named twice: name each once")
    return found
