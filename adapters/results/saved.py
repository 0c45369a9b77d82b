"""A run folder as it lies on disk: its documents, and its tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from funcprobe.types import InputError

from ..config import toml
from ..machine.home import expanded
from . import frames, notebook
from .belonging import why_not_of
from .manifest import Manifest
from .reading import load, load_manifest, load_whatif
from .schema import Results
from .whatif_sections import WhatIf

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa


class SavedRun(NamedTuple):
    """Everything that a run wrote; the tables are read when they are asked for."""

    folder: Path
    results: Results
    manifest: Manifest
    config: str
    """config.toml, resolved; empty where it is gone."""
    log: str
    """run.log; empty where it is gone, or a link."""
    whatif: WhatIf | None
    """RUN.FOLDER/RUN.NAME.whatif.json; None: `funcprobe whatif` has not compared rules of this run."""
    whatif_left_out: str | None = None
    """Why such a file is there but is not used, in a line: it is of another run, or cannot be read."""

    def table(self, name: str) -> "pa.Table | None":
        """modules, sequences or tokens, columns with units; None where the run has no such table.

        Raises InputError for a file that is no Parquet, or lacks what a run writes.
        """
        path = self.folder / f"{name}.parquet"
        if not path.is_file():
            return None
        from .table_columns import require_table  # imports pyarrow

        table = _parquet(path)
        require_table(table, name, path)
        return table

    @property
    def sweep(self) -> "pd.DataFrame":
        """The sweep, as `Results.to_dataframe` has it."""
        return self.results.to_dataframe()

    def to_pandas(self, name: str) -> "pd.DataFrame":
        """sweep, modules, sequences, tokens, prompts (`prompt_table`) or proxies (`proxy_table`).

        `attrs["units"]` is the unit of every column that has one. Raises InputError for another name,
        and for a table that the run does not have.
        """
        return frames.to_pandas(self, name)

    def to_polars(self, name: str) -> "pl.DataFrame":
        """The same tables for polars (extra `polars`), through Arrow."""
        return frames.to_polars(self, name)

    def _repr_html_(self) -> str:
        return notebook.run_html(self)

    def rollouts(self, batch: str) -> "pa.Table":
        """E or U as it entered the run: "eval" or "update".

        Raises InputError where the file is gone, is no Parquet, or lacks what a run writes.
        """
        from .table_columns import require_rollouts  # imports pyarrow

        path = self.folder / "rollouts" / f"{batch}.parquet"
        table = _parquet(path)
        require_rollouts(table, path)
        return table

    def settings(self) -> dict[str, dict[str, Any]]:
        """The sections of config.toml; {} where it is gone or damaged, without what is no section."""
        try:
            found = toml.parse(self.config)
        except ValueError:
            return {}
        return {name: section for name, section in found.items() if isinstance(section, dict)}


def load_run(folder: Path | str) -> SavedRun:
    """A run folder, also of an earlier version, with the rules that were compared on it.

    Raises InputError, one line, where results.json or manifest.json is missing, damaged or of another
    structure. Without config.toml, run.log or rules the rest is read; a file of rules that is damaged
    or of another run is left out, with the reason.
    """
    folder = expanded(folder)
    results, manifest = load(folder), load_manifest(folder)
    whatif, left_out = _rules(folder, results, manifest)
    config, log = _text(folder / "config.toml"), _text(folder / "run.log")
    return SavedRun(folder, results, manifest, config, log, whatif, left_out)


def rules_file(folder: Path) -> Path:
    """Where `funcprobe whatif` writes the rules of a run by default."""
    return folder.with_name(f"{folder.name}.whatif.json")


def _rules(folder: Path, results: Results, manifest: Manifest) -> tuple[WhatIf | None, str | None]:
    """The rules of this run, or the line that says why those that are there are not."""
    path = rules_file(folder.absolute())
    if not path.is_file():
        return None, None
    try:
        found = load_whatif(path)
    except InputError as error:
        return None, str(error)
    why = why_not_of(found, results, manifest)
    if why is None:
        return found, None
    return None, f"{path.name} is of another run: {why}; funcprobe whatif compares the rules again"


def _text(path: Path) -> str:
    """Empty if it is missing, and of a link: a stranger's would show any file of the reader's."""
    if path.is_symlink() or not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _parquet(path: Path) -> "pa.Table":
    from ..machine import parquet  # imports pyarrow

    if not path.exists():
        raise InputError(f"{path} is missing: copy the whole run folder, or repeat the run")
    try:
        return parquet.read(path)
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): repeat the run") from error
