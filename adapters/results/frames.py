"""The tables of a run as Arrow, pandas and polars, each column with its unit."""

from typing import TYPE_CHECKING

from funcprobe.types import InputError

from .prompt_table import prompt_table
from .proxy_table import proxy_table

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    from .saved import SavedRun

FRAMES = ("sweep", "modules", "sequences", "tokens", "prompts", "proxies")


def arrow(run: "SavedRun", name: str) -> "pa.Table":
    """One of FRAMES; InputError for another name, and for a table that the run does not have."""
    import pyarrow as pa

    if name == "sweep":
        return pa.Table.from_pandas(run.results.to_dataframe(), preserve_index=False)
    if name not in FRAMES:
        raise InputError(f"{name!r:.60} is no table of a run: expected one of {', '.join(FRAMES)}")
    table = _table(run, name)
    if table is None:
        raise InputError(
            f"{run.folder} has no table {name}: it was run without shares of {_needs(name)}, or U has "
            'no gradient; repeat the run with attribution.level = "tokens"'
        )
    return table


def to_pandas(run: "SavedRun", name: str) -> "pd.DataFrame":
    """With `attrs["units"]`, column -> unit; of the sweep as `Results.to_dataframe`."""
    if name == "sweep":
        return run.results.to_dataframe()
    table = arrow(run, name)
    frame: pd.DataFrame = table.to_pandas()
    frame.attrs["units"] = {
        field.name: field.metadata[b"unit"].decode()
        for field in table.schema
        if field.metadata and field.metadata.get(b"unit")
    }
    return frame


def to_polars(run: "SavedRun", name: str) -> "pl.DataFrame":
    """InputError where polars is not installed."""
    try:
        import polars as pl
    except ImportError as error:
        raise InputError(
            "polars is not installed: pip install 'funcprobe[polars]', or use to_pandas"
        ) from error
    frame = pl.from_arrow(arrow(run, name).replace_schema_metadata())
    assert isinstance(frame, pl.DataFrame)
    return frame


def _table(run: "SavedRun", name: str) -> "pa.Table | None":
    if name == "prompts":
        return prompt_table(run)
    if name == "proxies":
        found = proxy_table(run)
        return None if found is None else found.tokens
    return run.table(name)


def _needs(name: str) -> str:
    return {"tokens": "tokens", "proxies": "tokens", "modules": "modules"}.get(name, "prompts")
