"""Lists of numbers one after another in an array: a fifth of the memory of Python's."""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, overload

import numpy as np

AT_ONCE = 256  # rows that are lists at the same time


class Ragged(Sequence[list[Any]]):
    """A column of lists, of which each is made when it is asked for; equal to the list of them.

    `flat` has integers, doubles or booleans, `offsets` where each row begins, and the end of the last.
    """

    def __init__(self, flat: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]) -> None:
        self.flat, self.offsets = flat, offsets

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Entries of every row."""
        return np.diff(self.offsets)

    def row_of(self, entries: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The rows in which entries of `flat` are."""
        return np.searchsorted(self.offsets, entries, side="right") - 1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, place: int) -> list[Any]: ...

    @overload
    def __getitem__(self, place: slice) -> list[list[Any]]: ...

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        i = range(len(self))[place]  # IndexError beyond the end
        return self.flat[self.offsets[i] : self.offsets[i + 1]].tolist()

    def __iter__(self) -> Iterator[list[Any]]:
        for start in range(0, len(self), AT_ONCE):
            some = self.offsets[start : start + AT_ONCE + 1].tolist()
            values = self.flat[some[0] : some[-1]].tolist()
            for begin, end in pairwise(some):
                yield values[begin - some[0] : end - some[0]]

    def __contains__(self, row: object) -> bool:
        return isinstance(row, list) and any(row == own for own in self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | Ragged) or len(other) != len(self):
            return NotImplemented if not isinstance(other, list | Ragged) else False
        return all(own == row for own, row in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


def joined(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all, in order, in the smallest type that has all of them."""
    flat = np.concatenate([part.flat for part in parts]) if parts else np.zeros(0, np.int64)
    ends = np.cumsum([0, *(len(part.flat) for part in parts)])
    offsets = [part.offsets[:-1] + begin for part, begin in zip(parts, ends, strict=False)]
    return Ragged(flat, np.concatenate([*offsets, ends[-1:]]).astype(np.int64))


def of_rows(rows: Sequence[Any], kind: str) -> Ragged | None:
    """Lists of one kind, "int", "float" or "bool", as they are read of JSON; None for anything else.

    Integers among floats are floats, up to 2^53, to which they are exact.
    """
    if not all(type(row) is list for row in rows):
        return None
    values = list(chain.from_iterable(rows))
    types = set(map(type, values))
    if kind == "float":
        exact = int not in types or all(abs(x) <= 2**53 for x in values if type(x) is int)
        if not types <= {int, float} or not exact:
            return None
        flat = np.array(values, np.float64)
    elif kind == "bool":
        if not types <= {bool}:
            return None
        flat = np.array(values, np.bool_)
    else:
        if not types <= {int} or (values and not -(2**63) <= min(values) <= max(values) < 2**63):
            return None
        flat = narrow(np.array(values, np.int64))
    return Ragged(flat, np.cumsum([0, *map(len, rows)]).astype(np.int64))


def narrow(flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers in 32 bits, if all of them fit."""
    if len(flat) and not (flat.min() >= -(2**31) and flat.max() < 2**31):
        return flat
    return flat.astype(np.int32)
