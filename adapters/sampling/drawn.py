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


def unpacked(tensors: Sequence[Tensor]) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """Of `packed`: responses by row, and their log-probabilities; none if these were not given."""
    row_n, length_n, *columns = tensors
    rows, lengths = row_n.tolist(), length_n.tolist()
    split = [dict(zip(rows, flat_T.split(lengths), strict=True)) for flat_T in columns]
    ids, *logp = [{i: part.tolist() for i, part in by_row.items()} for by_row in split]
    return ids, logp[0] if logp else {}
