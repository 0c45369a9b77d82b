"""Columns that grow batch by batch as a file is read: numbers in arrays, all else as Python values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import SCHEMA
from .ragged import Ragged, joined, narrow, of_rows


class Growing:
    """One column; `kind` of the numbers in its lists, by SCHEMA, None for a column of no lists."""

    def __init__(self, name: str, missing: int = 0) -> None:
        of = SCHEMA.field(name).type if name in SCHEMA.names else None
        self._kind = _KINDS[of.value_type] if of is not None and pa.types.is_list(of) else None
        self._parts: list[Ragged] = []
        compact = self._kind is not None and not missing
        self._values: list[Any] | None = None if compact else [None] * missing

    def add(self, values: Sequence[Any]) -> None:
        """Python values, None where one is missing."""
        part = None
        if self._values is None and self._kind is not None:
            part = of_rows(values, self._kind)
        self._append(part, values)

    def add_arrow(self, values: pa.Array) -> None:
        """A batch's values."""
        part = _of_arrow(values, self._kind) if self._values is None else None
        self._append(part, None if part is not None else values.to_pylist())

    def found(self) -> Sequence[Any]:
        """All of them."""
        return joined(self._parts) if self._values is None else self._values

    def _append(self, part: Ragged | None, values: Sequence[Any] | None) -> None:
        if part is not None:
            self._parts.append(part)
            return
        if self._values is None:  # a value of another kind, which is a list's to have
            self._values, self._parts = [row for one in self._parts for row in one], []
        self._values += values or []


def _of_arrow(values: pa.Array, kind: str | None) -> Ragged | None:
    """Lists of numbers without a missing one; None for anything else."""
    kinds = values.type
    if not (pa.types.is_list(kinds) or pa.types.is_large_list(kinds)) or values.null_count:
        return None
    flat, of = values.flatten(), kinds.value_type
    if flat.null_count:
        return None
    ends = np.cumsum(pc.list_value_length(values).to_numpy(zero_copy_only=False))
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    if kind == "int" and of in _INTEGERS:
        return Ragged(narrow(flat.to_numpy().astype(np.int64)), offsets)
    if kind == "float" and of in {pa.float32(), pa.float64()}:
        return Ragged(flat.to_numpy().astype(np.float64), offsets)
    if kind == "bool" and pa.types.is_boolean(of):
        return Ragged(flat.to_numpy(zero_copy_only=False), offsets)
    return None


_KINDS = {pa.int64(): "int", pa.float64(): "float", pa.bool_(): "bool"}
_INTEGERS = {pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()}
