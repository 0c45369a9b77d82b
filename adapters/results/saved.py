"""A run folder as it lies on disk: its documents, and its tables."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from funcprobe.types import InputError

from .manifest import Manifest
from .reading import load, load_manifest, load_whatif
from .schema import Results
from .whatif_sections import WhatIf

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = ("modules", "sequences", "tokens")


class SavedRun(NamedTuple):
    """Everything that a run wrote; the tables are read when they are asked for."""

    folder: Path
    results: Results
    manifest: Manifest
    config: str
    """config.toml, resolved; empty where it is gone."""
    log: str
    """run.log; empty where it is gone."""
    whatif: WhatIf | None
    """RUN.FOLDER/RUN.NAME.whatif.json; null: `funcprobe whatif` has not compared rules of this run."""

    def table(self, name: str) -> "pa.Table | None":
        """modules, sequences or tokens, columns with units; None where the run has no such table.

        Raises InputError for a file that is no Parquet.
        """
        path = self.folder / f"{name}.parquet"
        return _parquet(path) if path.is_file() else None

    def rollouts(self, batch: str) -> "pa.Table":
        """E or U as it entered the run: "eval" or "update"; InputError where the file is gone."""
        return _parquet(self.folder / "rollouts" / f"{batch}.parquet")


def load_run(folder: Path | str) -> SavedRun:
    """A run folder; raises InputError as `load` does."""
    folder = Path(folder).expanduser()
    whatif = folder.with_name(f"{folder.name}.whatif.json")
    return SavedRun(
        folder,
        load(folder),
        load_manifest(folder),
        _text(folder / "config.toml"),
        _text(folder / "run.log"),
        load_whatif(whatif) if whatif.is_file() else None,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parquet(path: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: copy the whole run folder, or repeat the run") from error
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read ({reason}): repeat the run") from error
