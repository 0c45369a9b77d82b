"""Whether all rows meet a requirement, at once; where not, checks.py finds the first that does not.

False also of columns that are no arrays of numbers.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from .ragged import Ragged


def tokens_are_right(columns: dict[str, Sequence[Any]], vocabulary: int) -> bool:
    """No row is without tokens, none has an id outside the vocabulary, no index has two prompts."""
    x, y = columns["prompt_ids"], columns["response_ids"]
    if not (isinstance(x, Ragged) and isinstance(y, Ragged)):
        return False
    for column in (x, y):
        if not column.lengths.all() or column.flat.min() < 0 or column.flat.max() >= vocabulary:
            return False
    prompts: dict[int, bytes] = {}
    ends = zip(columns["prompt_index"], x.offsets[:-1], x.offsets[1:], strict=True)
    rows = ((index, x.flat[start:end].tobytes()) for index, start, end in ends)
    return all(prompts.setdefault(index, row) == row for index, row in rows)


def ends_are_right(
    columns: dict[str, Sequence[Any]], eos_ids: Collection[int], *, masked: bool
) -> bool:
    """finish_reason is known, it agrees with the last token, and an EOS before that is a tool's."""
    y, masks = columns["response_ids"], columns["loss_mask"] if masked else None
    of_rows = masks is not None and masks[0] is not None
    if not isinstance(y, Ragged) or (of_rows and not isinstance(masks, Ragged)):
        return False
    ended = np.isin(y.flat, list(eos_ids))
    last = y.offsets[1:] - 1
    inner = ended.copy()
    inner[last] = False
    after = np.flatnonzero(inner) + 1  # in the same row, as it is not the last
    if masks.flat[after].any() if of_rows and isinstance(masks, Ragged) else len(after):
        return False
    reasons = zip(columns["finish_reason"], ended[last].tolist(), strict=True)
    right = {(None, True), (None, False), ("stop", True), ("length", False)}
    if not eos_ids:
        right |= {("stop", False)}
    return all(pair in right for pair in reasons)


def values_are_right(columns: dict[str, Sequence[Any]], name: str, *, unknown: bool) -> bool:
    """One value for each response token; of log-probabilities finite and at most 0, or NaN."""
    found, y = columns[name], columns["response_ids"]
    if not (isinstance(found, Ragged) and isinstance(y, Ragged)):
        return False
    if not np.array_equal(found.lengths, y.lengths):
        return False
    if name == "loss_mask":
        return True
    right = (found.flat < 0.01) & (found.flat > -np.inf)
    return bool((right | np.isnan(found.flat) if unknown else right).all())
