"""Data sets of very many rows: their rows are counted, and read as they are drawn."""

import shutil
import tempfile
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from funcprobe.types import InputError

from ..machine import parquet
from ..machine.home import expanded
from .sources import Row, csv_dataset, json_line, opened_dataset, plain, read_rows, require_file

LARGE = 50_000  # rows; of fewer every one is read and checked
CHUNK = 2**24  # bytes of a file at once
BATCH = 4096  # rows of Parquet at once
BOM = b"\xef\xbb\xbf"


@runtime_checkable
class LargeRows(Protocol):
    """Rows by their place, from 0."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> list[Row]:
        """The rows at these places, in this order. InputError if they cannot be read."""
        ...


def open_rows(source: str, split: str) -> list[Row] | LargeRows:
    """The rows of a source; of more than `LARGE` their number alone is read, but for an array of JSON.

    The order is that of `sources.read_rows`. InputError as there.
    """
    path = expanded(source)
    if not path.is_file():
        found = opened_dataset(source, split)
        return OfDataset(found) if len(found) > LARGE else plain(found)
    require_file(path, source)
    counted = {".parquet": _parquet, ".csv": _csv}.get(path.suffix, _json_lines)
    try:
        found = counted(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        found = None  # read_rows says what it is
    return found or read_rows(source, split)


class OfDataset:
    """Rows of a data set of `datasets`, or of whatever has a length and rows, without some columns."""

    def __init__(self, found: Any, without: Sequence[str] = ()) -> None:
        self._found, self._without = found, without

    def __len__(self) -> int:
        return len(self._found)

    def take(self, indices: Sequence[int]) -> list[Row]:
        """As of `LargeRows`."""
        rows = {i: dict(self._found[i]) for i in sorted(set(indices))}
        return [{k: v for k, v in rows[i].items() if k not in self._without} for i in indices]


class _File:
    """A file that is to stay as it was when its rows were counted."""

    def __init__(self, path: Path) -> None:
        self.path, self._known = path, _state(path)

    def require_unchanged(self) -> None:
        if _state(self.path) != self._known:
            raise InputError(
                f"{self.path} changed after its rows were counted: the draws are of its first content; "
                "leave it as it is while it is read"
            )


class _Parquet(_File):
    """Rows of the groups in which one is drawn, a batch at a time."""

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(path)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def take(self, indices: Sequence[int]) -> list[Row]:
        self.require_unchanged()
        wanted, found = sorted(set(indices)), dict[int, Row]()
        try:
            with parquet.opened(self.path) as file:
                for start, batch in _batches(file, wanted):
                    end = start + len(batch)
                    for i in wanted[bisect_left(wanted, start) : bisect_left(wanted, end)]:
                        (found[i],) = batch.slice(i - start, 1).to_pylist()
        except (OSError, UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException) as error:
            raise InputError(
                f"{self.path} cannot be read as Parquet: {' '.join(str(error).split())}"
            ) from error
        if lost := [i for i in wanted if i not in found]:
            raise InputError(
                f"{self.path} has no row {lost[0]}, of {self._count} by its metadata: it is damaged"
            )
        return [found[i] for i in indices]


def _batches(file: pq.ParquetFile, wanted: Sequence[int]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches up to the last wanted row of each group that has one, with the place of their first."""
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        own = wanted[bisect_left(wanted, start) : bisect_left(wanted, end)]
        if own:
            at = start
            for batch in file.iter_batches(BATCH, row_groups=[group]):
                yield at, parquet.checked(batch)
                at += len(batch)
                if at > own[-1]:
                    break
        start = end


class _JsonLines(_File):
    """Rows by the places in the file where their lines begin."""

    def __init__(self, path: Path, begin_N: Any) -> None:
        super().__init__(path)
        self._begin_N = begin_N

    def __len__(self) -> int:
        return len(self._begin_N)

    def take(self, indices: Sequence[int]) -> list[Row]:
        self.require_unchanged()
        found: dict[int, Row] = {}
        with self.path.open("rb") as file:
            for i in sorted(set(indices)):
                begin = int(self._begin_N[i])
                file.seek(begin)
                found[i] = json_line(self.path, file.readline(), partial(self._number, begin))
        return [found[i] for i in indices]

    def _number(self, begin: int) -> int:
        """The line, from 1, that begins there."""
        count, left = 1, begin
        with self.path.open("rb") as file:
            while left and (chunk := file.read(min(CHUNK, left))):
                count, left = count + chunk.count(b"\n"), left - len(chunk)
        return count


def _parquet(path: Path) -> LargeRows | None:
    with pq.ParquetFile(path, thrift_container_size_limit=parquet.PARTS) as file:
        count = file.metadata.num_rows
    return _Parquet(path, count) if count > LARGE else None


def _csv(path: Path) -> LargeRows | None:
    """As `datasets` writes it once, beside the temporary files, where its rows are found."""
    if sum(chunk.count(b"\n") for chunk in _chunks(path)) <= LARGE:
        return None
    folder = tempfile.mkdtemp(prefix="funcprobe-csv-")
    try:
        found = OfDataset(csv_dataset(path, folder, in_memory=False))
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found if len(found) > LARGE else None


def _json_lines(path: Path) -> LargeRows | None:
    begin_N = _beginnings(path)
    if len(begin_N) <= LARGE:
        return None
    with path.open("rb") as file:
        file.seek(int(begin_N[0]))
        if file.readline().lstrip().startswith(b"["):
            return None
    return _JsonLines(path, begin_N)


def _beginnings(path: Path) -> Any:
    """Where in a file the lines begin that are not blank."""
    pieces, blank, offset, begins = [], [], 0, True
    for chunk in _chunks(path):
        data = np.frombuffer(chunk, np.uint8)
        first = 3 if not offset and chunk.startswith(BOM) else 0
        at = np.flatnonzero(data == ord("\n")) + 1
        at = np.concatenate([[first] if begins else [], at]).astype(np.int64)
        begins = bool(len(at)) and at[-1] == len(data)
        at = at[:-1] if begins else at
        pieces.append(at + offset)
        blank.append(_MAY_BE_BLANK[data[at]])
        offset += len(chunk)
    if not pieces:
        return np.zeros(0, np.int64)
    begin_N, blank_N = np.concatenate(pieces), np.concatenate(blank)
    with path.open("rb") as file:
        for i in np.flatnonzero(blank_N):
            file.seek(int(begin_N[i]))
            blank_N[i] = not file.readline().decode("utf-8", "replace").strip()
    return begin_N[~blank_N]


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


# A line that Python's strip() leaves nothing of begins with one of these.
_MAY_BE_BLANK = np.array([byte >= 128 or not chr(byte).strip() for byte in range(256)])


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns
