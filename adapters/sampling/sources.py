"""Rows of a data set: from a file, from a folder, from the Hub."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow

from funcprobe.types import InputError

from ..config.paths import FILE_TYPES
from ..machine import parquet
from ..machine.home import expanded
from ..machine.pointers import pointer
from ..strict_json import require_shallow
from .dataset_folders import require_own_files

Row = dict[str, object]

# What `save_to_disk` of datasets (4.0) leaves in the folder of a split, and in that of several.
_SAVED, _SPLITS = ("dataset_info.json", "state.json"), "dataset_dict.json"


def read_rows(source: str, split: str) -> list[Row]:
    """Every row of a .jsonl, .json, .parquet or .csv file, or of `split` of a data set.

    A data set is a folder written by `save_to_disk`, or a folder or name that `datasets.load_dataset`
    takes ("openai/gsm8k:main": the configuration after a colon). A file has no splits, nor has a folder
    saved from one. InputError, one line, if it cannot be read.
    """
    path = expanded(source)
    if path.is_file():
        require_file(path, source)
        readers = {".parquet": _parquet, ".csv": _csv}
        return readers.get(path.suffix, _json)(path)
    return plain(opened_dataset(source, split))


def require_file(path: Path, source: str) -> None:
    """InputError for a file that is of no known type, or a pointer to one."""
    if path.suffix not in FILE_TYPES:
        raise InputError(f"{source}: expected a file of type {', '.join(FILE_TYPES)}")
    if missing := pointer(path):
        raise missing


def opened_dataset(source: str, split: str) -> Any:
    """What `datasets` has of a source that is no file; InputError if it has nothing."""
    path = expanded(source)
    if path.is_dir():
        saved = (path / _SPLITS).is_file() or all((path / name).is_file() for name in _SAVED)
        require_own_files(path)
        return _saved(path, split) if saved else _dataset(str(path), split)
    if path.suffix in FILE_TYPES or source.startswith((".", "/", "~")):
        raise InputError(f"file not found: {source} (from {Path.cwd()}): correct the path")
    return _dataset(source, split)


def csv_dataset(path: Path, cache: str, *, in_memory: bool) -> Any:
    """As `datasets` reads it, for the types of a trainer's columns, with its files in `cache`."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    _quiet()
    try:
        return Dataset.from_csv(
            str(path), cache_dir=cache, keep_in_memory=in_memory, encoding="utf-8-sig"
        )
    except (OSError, ValueError, RuntimeError, DatasetsError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as CSV: {_line(error.__cause__ or error)}") from error


def json_line(path: Path, line: bytes, number: Callable[[], int]) -> Row:
    """The object of a line; InputError, with its `number`, if it has none."""
    try:
        row = json.loads(line.decode("utf-8"))
        require_shallow(row)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number()}: expected UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:  # the first: too deep, a number of too many digits
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        why = error.msg if isinstance(error, json.JSONDecodeError) else why
        raise InputError(
            f"{path}, line {number()}: {why}; expected one JSON object per line: correct or drop it"
        ) from error
    if not isinstance(row, dict):
        raise InputError(
            f"{path}, line {number()}: {type(row).__name__}, expected a JSON object: drop the line"
        )
    return row


def _json(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read, expected UTF-8 text: {error}") from error
    whole = text.lstrip().startswith("[")
    rows: list[Row] = []
    # Not splitlines(), which also splits at U+2028 and similar, allowed inside a JSON string.
    for number, chunk in [(1, text)] if whole else enumerate(text.split("\n"), 1):
        if not chunk.strip():
            continue
        try:
            found = json.loads(chunk)
            require_shallow(found)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number + error.lineno - 1}: {error.msg}; expected one JSON object "
                "per line, or one array of objects: correct or drop the line"
            ) from error
        except (ValueError, RecursionError) as error:  # too deep, a number of too many digits
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise InputError(f"{path}, line {number}: {why}: correct or drop the line") from error
        rows += found if whole else [found]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: {type(row).__name__}, expected a JSON object")
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        rows: list[Row] = parquet.read(path).to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:  # the others: of dates
        raise InputError(f"{path} cannot be read as Parquet: {_line(error)}") from error
    return rows


def _csv(path: Path) -> list[Row]:
    """Nothing is left in the cache of `datasets`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as CSV: {_line(error)}") from error
    if sum(bool(line.strip()) for line in lines) < 2:
        return []  # names of columns alone, for which datasets has an error of its own
    with tempfile.TemporaryDirectory() as cache:
        return plain(csv_dataset(path, cache, in_memory=True))


def _saved(path: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{path} is a saved data set that cannot be read ({_line(error)}): save it again"
        ) from error
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise InputError(
            f"{path} has no split {split!r}, its splits are: {', '.join(found)}; set prompts.split"
        )
    return found[split]


def _dataset(source: str, split: str) -> Any:
    # Imported here, as it takes a second and local files do not need it.
    import datasets
    from datasets.exceptions import DatasetsError

    _quiet()
    name, _, configuration = source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=split)
    # Not found or no network: OSError; unknown configuration or split: ValueError; a dataset that
    # needs a script: RuntimeError (datasets 4 and later); a package of its format: ImportError.
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise InputError(
            f"dataset {name!r} (configuration {configuration or None!r}, split {split!r}) cannot be "
            f"loaded: {_line(error)}; expected a name on the Hub (openai/gsm8k:main) or a local file"
        ) from error
    return found


def plain(found: Any) -> list[Row]:
    """Every row of what `datasets` has."""
    return [dict(row) for row in found]


def _quiet() -> None:
    import datasets

    datasets.disable_progress_bars()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
