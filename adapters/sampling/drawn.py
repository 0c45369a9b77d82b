"""Responses that are drawn already, as tensors: of an interrupted sampling, or of a stage."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def packed(
    ids: Mapping[int, Sequence[int]], logp: Mapping[int, Sequence[float]] | None = None
) -> list[Tensor]:
    """Rows, lengths, tokens of all responses in a row, and their log-probabilities if given."""
    rows = sorted(ids)
    columns = [rows, [len(ids[i]) for i in rows], [token for i in rows for token in ids[i]]]
    found = [torch.tensor(column, dtype=torch.int64) for column in columns]
    if logp is not None:
        flat = [x for i in rows for x in logp[i]]
        found.append(torch.tensor(flat, dtype=torch.float64))
    return found


def are_packed(
    tensors: Sequence[Tensor], asked: int, most: int, vocabulary: int, *, logp: bool = False
) -> bool:
    """Whether they are `packed` responses of 1 to `most` tokens to some of these prompts."""
    dtypes = [torch.int64] * 3 + [torch.float64] * logp
    if [(x.dtype, x.dim()) for x in tensors] != [(dtype, 1) for dtype in dtypes]:
        return False
    row_n, length_n, token_T = tensors[:3]
    return (
        0 < len(row_n) == len(length_n)
        and row_n.tolist() == row_n.unique().tolist()
        and bool(((row_n >= 0) & (row_n < asked) & (length_n >= 1) & (length_n <= most)).all())
        and all(len(x) == int(length_n.sum()) for x in tensors[2:])
        and bool(((token_T >= 0) & (token_T < vocabulary)).all())
    )


def unpacked(tensors: Sequence[Tensor]) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """Of `packed`: responses by row, and their log-probabilities; none if these were not given."""
    row_n, length_n, *columns = tensors
    rows, lengths = row_n.tolist(), length_n.tolist()
    split = [dict(zip(rows, flat_T.split(lengths), strict=True)) for flat_T in columns]
    ids, *logp = [{i: part.tolist() for i, part in by_row.items()} for by_row in split]
    return ids, logp[0] if logp else {}
