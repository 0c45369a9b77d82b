"""Tables of rollouts on disk, Parquet or JSON lines by the file's extension, as columns."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from funcprobe.types import InputError

from .. import strict_json
from ..machine import parquet
from ..machine.pointers import pointer
from .columns import SCHEMA
from .growing import Growing
from .ragged import Ragged, joined

ENDINGS = (".parquet", ".jsonl", ".json")
MARK = "response_ids"  # the column by which a file is in SCHEMA
BATCH = 512  # rows that are Python values at the same time

Part: TypeAlias = Literal["all", "schema", "others"]


class Columns(NamedTuple):
    """A table as plain values; a missing value is None."""

    path: Path
    place: Sequence[str]  # of every row, for messages: "row 0" of Parquet, "line 1" of JSON lines
    values: dict[str, Sequence[Any]]  # empty of a column that was not to be read


def of_rank(path: Path, rank: int, count: int) -> Path:
    """The file of one of several processes: step-000006.rank-00000-of-00002.parquet."""
    return path.with_name(f"{path.stem}.rank-{rank:05d}-of-{count:05d}{path.suffix}")


def files_of(path: Path) -> list[Path]:
    """The files that a path of rollouts stands for: itself, or where it does not exist, of all ranks.

    In the order of ranks. Raises InputError, naming them, for missing ranks and for those of trainings
    with different numbers of processes.
    """
    pattern = re.compile(
        rf"{re.escape(path.stem)}\.rank-(\d{{5}})-of-(\d{{5}}){re.escape(path.suffix)}"
    )
    if path.exists() or not path.parent.is_dir():
        return [path]
    matches = [match for file in path.parent.iterdir() if (match := pattern.fullmatch(file.name))]
    if not matches:
        return [path]
    counts = sorted({int(match[2]) for match in matches})
    if len(counts) > 1:
        raise InputError(
            f"{path}: there are files of ranks of {' and of '.join(map(str, counts))} processes: keep "
            "those of one training"
        )
    ranks = range(counts[0])
    if missing := sorted(set(ranks) - {int(match[1]) for match in matches}):
        raise InputError(
            f"{path}: of the files of {counts[0]} ranks, {', '.join(map(str, missing))} are missing: "
            f"copy all of them, such as {of_rank(path, missing[0], counts[0]).name}"
        )
    return [of_rank(path, rank, counts[0]) for rank in ranks]


def require_all_ranks(path: Path) -> None:
    """InputError for the file of one rank of several, which has a part of a step."""
    one = re.fullmatch(r"(.+)\.rank-\d{5}-of-(\d{5})", path.stem)
    if one is not None and int(one[2]) > 1:
        raise InputError(
            f"{path} has the rows of one of {int(one[2])} processes: give the path of all of them, "
            f"{path.with_name(one[1] + path.suffix).name}"
        )


def read_columns(path: Path, part: Part = "all") -> Columns:
    """The columns of a .parquet file, or of a .jsonl or .json file with one object per line.

    A batch of rows at a time: token ids and log-probabilities take little more memory than in the file.
    Of a file in SCHEMA the `part`: "all" columns, those of the "schema", or the "others"; the names of
    all are there. Of another file all are read, but for "others" alike.

    Of a Parquet file that does not exist, but of which several processes wrote their parts, the rows of
    all ranks. JSON numbers keep their type and the precision of a double. NaN and infinities, which
    Python writes, are read as such, so that one in a column of no concern does no harm. Raises
    InputError for a file that is missing, of another type or damaged, with the line; of ranks, as
    `files_of`.
    """
    if path.suffix == ".parquet" and (files := files_of(path)) != [path]:
        return _joined(path, [read_columns(file, part) for file in files])
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the file in it, of Parquet or JSON lines")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give rollouts as Parquet or JSON lines")
    if path.suffix not in ENDINGS:
        raise InputError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}: rename it")
    if missing := pointer(path):
        raise missing
    return _read_parquet(path, part) if path.suffix == ".parquet" else _read_json(path, part)


def _joined(path: Path, parts: Sequence[Columns]) -> Columns:
    names = dict.fromkeys(name for part in parts for name in part.values)
    places = [f"{place} of rank {rank}" for rank, part in enumerate(parts) for place in part.place]
    values: dict[str, Sequence[Any]] = {}
    for name in names:
        columns = [part.values.get(name, [None] * len(part.place)) for part in parts]
        ragged = [column for column in columns if isinstance(column, Ragged)]
        alike = len(ragged) == len(parts)
        values[name] = joined(ragged) if alike else [x for column in columns for x in column]
    return Columns(path, places, values)


def _is_read(name: str, names: Collection[str], part: Part) -> bool:
    """Whether a column is of the part of a file with these names that is asked for."""
    if part == "all" or MARK not in names:
        return part != "others" or name not in SCHEMA.names
    return (name in SCHEMA.names) == (part == "schema")


def write_parquet(columns: Mapping[str, Sequence[Any]], schema: pa.Schema, path: Path) -> None:
    """Write the columns of `schema`."""
    arrays = [_array(columns[field.name], field.type) for field in schema]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def write_json(columns: Mapping[str, Sequence[Any]], schema: pa.Schema, path: Path) -> None:
    """Write one object per line, without keys that are None. InputError for NaN and infinities."""
    lines = []
    for i in range(len(columns[schema.names[0]])):
        row = {name: columns[name][i] for name in schema.names if columns[name][i] is not None}
        try:
            lines.append(json.dumps(row, allow_nan=False) + "\n")
        except ValueError as error:
            raise InputError(
                f"row {i} contains a number that is not finite ({error}): write Parquet"
            ) from error
    path.write_text("".join(lines), encoding="utf-8")


def _array(values: Sequence[Any], of: pa.DataType) -> pa.Array:
    if isinstance(values, Ragged):
        return pa.ListArray.from_arrays(pa.array(values.offsets, pa.int32()), values.flat).cast(of)
    return pa.array(values, of)


def _read_parquet(path: Path, part: Part) -> Columns:
    count = 0
    try:
        with parquet.opened(path) as file:
            names = _distinct(file.schema_arrow.names)
            read = [name for name in names if _is_read(name, names, part)]
            columns = {name: Growing(name) for name in read}
            # Else all: by a name with a dot part of another column would be found.
            chosen = read if part == "schema" else None
            for batch in file.iter_batches(BATCH, columns=chosen):
                parquet.checked(batch)
                count += len(batch)
                for name, values in zip(batch.schema.names, batch.columns, strict=True):
                    if name in columns:
                        columns[name].add_arrow(values)
            rows = file.metadata.num_rows
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:200]}): write it again"
        ) from error
    if read and count != rows:
        raise InputError(
            f"{path} has {count} rows, {rows} by its metadata: it is damaged; write it again"
        )
    found = {name: columns[name].found() if name in columns else () for name in names}
    return Columns(path, [f"row {i}" for i in range(rows)], found)


def _distinct(names: list[str]) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"Multiple matches for the column {twice}")
    return names


def _read_json(path: Path, part: Part) -> Columns:
    columns: dict[str, Growing | None] = {}
    places: list[str] = []
    rows: list[dict[str, Any]] = []

    def keep() -> None:
        names = dict.fromkeys(name for row in rows for name in row)
        for name in names:
            if name not in columns:
                read = _is_read(name, {*columns, *names}, part)
                columns[name] = Growing(name, len(places) - len(rows)) if read else None
        for name, column in columns.items():
            if column is not None:
                column.add([row.get(name) for row in rows])
        rows.clear()

    for number, line in _lines(path):
        try:
            row = strict_json.parse(line, nan=True)
        except ValueError as error:
            raise InputError(
                f"{path}: line {number} cannot be read ({error}): one JSON object per line is "
                "expected; check whether the file is truncated"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: line {number} is {type(row).__name__}, one JSON object per line is expected"
            )
        rows.append(row)
        places.append(f"line {number}")
        if len(rows) == BATCH:
            keep()
    keep()
    found = {name: () if column is None else column.found() for name, column in columns.items()}
    return Columns(path, places, found)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their number from 1."""
    try:
        # With or without a byte order mark. No other end of a line than \n: JSON may have U+2028.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read, expected UTF-8 text: {error}") from error
