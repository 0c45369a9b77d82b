"""A run folder -> its typed results and manifest; InputError for files of another structure."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from funcprobe.types import InputError

from . import manifest, schema
from .manifest import Manifest
from .quantity import Section
from .schema import Results

Document = TypeVar("Document", bound=Section)


def load(run_folder: Path | str) -> Results:
    """results.json of a run folder, every number with its unit; `.to_dataframe()` is its sweep.

    A file written before structures had versions has that of version 1. Raises InputError, one line,
    where there is no such file, where it is no JSON, or where its structure is another.
    """
    return _read(Path(run_folder), "results.json", Results, schema.SCHEMA_VERSION)


def load_manifest(run_folder: Path | str) -> Manifest:
    """manifest.json of a run folder; raises InputError as `load` does."""
    return _read(Path(run_folder), "manifest.json", Manifest, manifest.SCHEMA_VERSION)


def _read(folder: Path, name: str, model: type[Document], newest: int) -> Document:
    path = folder.expanduser() / name
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give a run folder, as runs/quickstart"
        ) from error
    except (ValueError, RecursionError) as error:  # of JSON, of its encoding, of its depth
        raise InputError(f"{path} is not JSON ({error}): repeat the run") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}, an object is expected")
    version = document.get("schema_version", 1)
    if version != newest:
        raise InputError(
            f"{path} has schema_version {version!r}, this funcprobe reads {newest}: read it with the "
            "funcprobe that wrote it (its version is in manifest.json), or repeat the run"
        )
    try:
        return model.model_validate({"schema_version": newest, **document})
    except ValidationError as error:
        raise InputError(f"{path} is not as funcprobe writes it: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    """The place and the reason of the first of the errors, and how many more there are."""
    found: Any = error.errors(include_url=False, include_context=False)
    place = ".".join(str(part) for part in found[0]["loc"])
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{place}: {found[0]['msg']}{more}"


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
