"""Tables of rollouts on disk, Parquet or JSON lines by the file's extension, as columns."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from funcprobe.types import InputError

from .. import strict_json
from ..machine.pointers import pointer

ENDINGS = (".parquet", ".jsonl", ".json")


class Columns(NamedTuple):
    """A table as plain values; a missing value is None."""

    path: Path
    place: Sequence[str]  # of every row, for messages: "row 0" of Parquet, "line 1" of JSON lines
    values: dict[str, list[Any]]


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


def read_columns(path: Path) -> Columns:
    """Every column of a .parquet file, or of a .jsonl or .json file with one object per line.

    Of a Parquet file that does not exist, but of which several processes wrote their parts, the rows of
    all ranks. JSON numbers keep their type and the precision of a double. NaN and infinities, which
    Python writes, are read as such, so that one in a column of no concern does no harm. Raises
    InputError for a file that is missing, of another type or damaged, with the line; of ranks, as
    `files_of`.
    """
    if path.suffix == ".parquet" and (files := files_of(path)) != [path]:
        return _joined(path, [read_columns(file) for file in files])
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the file in it, of Parquet or JSON lines")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give rollouts as Parquet or JSON lines")
    if path.suffix not in ENDINGS:
        raise InputError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}: rename it")
    if missing := pointer(path):
        raise missing
    return _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)


def _joined(path: Path, parts: Sequence[Columns]) -> Columns:
    names = dict.fromkeys(name for part in parts for name in part.values)
    places = [f"{place} of rank {rank}" for rank, part in enumerate(parts) for place in part.place]
    values = {
        name: [x for part in parts for x in part.values.get(name, [None] * len(part.place))]
        for name in names
    }
    return Columns(path, places, values)


def write_parquet(columns: Mapping[str, list[Any]], schema: pa.Schema, path: Path) -> None:
    """Write the columns of `schema`."""
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def write_json(columns: Mapping[str, list[Any]], schema: pa.Schema, path: Path) -> None:
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


def _read_parquet(path: Path) -> Columns:
    try:
        table = pq.read_table(path)
        names = table.column_names
        values = {name: column.to_pylist() for name, column in zip(names, table.columns, strict=True)}
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:200]}): write it again"
        ) from error
    return Columns(path, [f"row {i}" for i in range(len(table))], values)


def _read_json(path: Path) -> Columns:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read, expected UTF-8 text: {error}") from error
    rows: dict[str, dict[str, Any]] = {}
    # Not splitlines(), which also splits at U+2028 and similar, allowed inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
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
        rows[f"line {number}"] = row
    names = dict.fromkeys(name for row in rows.values() for name in row)
    values = {name: [row.get(name) for row in rows.values()] for name in names}
    return Columns(path, list(rows), values)
