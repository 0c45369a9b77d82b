"""A run folder as it lies on disk: its documents, and its tables as dataframes."""

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
    """config.toml, resolved."""
    log: str
    """run.log."""
    whatif: WhatIf | None
    """RUN.FOLDER/RUN.NAME.whatif.json; null: `funcprobe whatif` has not compared rules of this run."""

    def table(self, name: str) -> "pa.Table | None":
        """modules, sequences or tokens, columns with units; None where the run has no such table.

        Raises InputError for a file that is no Parquet.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / f"{name}.parquet"
        if not path.is_file():
            return None
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read ({error}): repeat the run") from error


def load_run(folder: Path | str) -> SavedRun:
    """A run folder; raises InputError as `load` does."""
    folder = Path(folder).expanduser()
    whatif = folder.with_name(f"{folder.name}.whatif.json")
    return SavedRun(
        folder,
        load(folder),
        load_manifest(folder),
        (folder / "config.toml").read_text(encoding="utf-8"),
        (folder / "run.log").read_text(encoding="utf-8"),
        load_whatif(whatif) if whatif.is_file() else None,
    )
