"""A run folder -> its typed results and manifest; InputError for files of another structure."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from funcprobe.types import InputError

from .. import strict_json
from ..machine.home import expanded
from ..store import require_finite
from . import comparison_sections, manifest, schema, whatif_sections
from .comparison_sections import Comparison
from .manifest import Manifest
from .quantity import Section
from .schema import Results
from .whatif_sections import WhatIf

Document = TypeVar("Document", bound=Section)
LARGEST = 1e150  # of a number in any document


def load(run_folder: Path | str) -> Results:
    """results.json of a run folder, every number with its unit; `.to_dataframe()` is its sweep.

    A file written before structures had versions has that of version 1. Raises InputError, one line,
    where there is no such file, where it is no JSON, or where its structure is another.
    """
    return _read(Path(run_folder) / "results.json", Results, schema.SCHEMA_VERSION)


def load_manifest(run_folder: Path | str) -> Manifest:
    """manifest.json of a run folder; raises InputError as `load` does."""
    return _read(Path(run_folder) / "manifest.json", Manifest, manifest.SCHEMA_VERSION)


def load_whatif(file: Path | str) -> WhatIf:
    """What `funcprobe whatif` wrote, as runs/one.whatif.json; raises InputError as `load` does."""
    return _read(Path(file), WhatIf, whatif_sections.SCHEMA_VERSION)


def load_comparison(file: Path | str) -> Comparison:
    """What `funcprobe compare` or `sweep` wrote, as compare.json; raises InputError as `load` does."""
    return _read(Path(file), Comparison, comparison_sections.SCHEMA_VERSION)


def _read(path: Path, model: type[Document], newest: int) -> Document:
    path = expanded(path)
    try:
        document = strict_json.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give a run folder, as runs/quickstart"
        ) from error
    except ValueError as error:  # of JSON, of its encoding
        raise InputError(f"{path} is not JSON ({error}): repeat the run") from error
    if not isinstance(document, dict):
        found = type(document).__name__
        raise InputError(f"{path} contains a {found}, an object is expected: give a run folder")
    version = document.setdefault("schema_version", 1)
    if type(version) is not int or version != newest:
        raise InputError(
            f"{path} has schema_version {version!r:.60}, this funcprobe reads {newest}: use the "
            "funcprobe that wrote it (its version is in manifest.json), or repeat the run"
        )
    require_finite(document, str(path))
    _require_ordinary(document, path)
    try:
        # From JSON text, where strict means that "1.0" and true are no numbers, and a list is a tuple.
        return model.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        reason = " ".join(_first(error).split())
        raise InputError(f"{path} differs from what a run writes: {reason}; repeat the run") from error


def _require_ordinary(value: Any, path: Path) -> None:
    """InputError for a number whose square, or difference to another, could not be computed."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _require_ordinary(part, path)
    elif isinstance(value, int | float) and abs(value) > LARGEST:
        raise InputError(f"{path} has a number above {LARGEST:g}, which no run writes: repeat the run")


def _first(error: ValidationError) -> str:
    """The place and the reason of the first of the errors, and how many more there are."""
    found: Any = error.errors(include_url=False, include_context=False)
    place = ".".join(str(part) for part in found[0]["loc"])
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{place}: {found[0]['msg']}{more}"
