"""report: what reads run folders."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from funcprobe.types import InputError


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as runs/quickstart.")],
    show: Annotated[
        bool, typer.Option("--open", help="Open it in the browser, where there is a display.")
    ] = False,
) -> None:
    """Write report.html and figures/ of a run folder again, also of an earlier version's.

    With the rules that `funcprobe whatif` has compared since. Nothing is computed by the model.
    """
    folder = folder.expanduser()
    if (folder / "results.json").is_file():  # else `write_report` says what was expected
        _require_writable(folder)
    from ..report.write import write_report

    path = write_report(folder)
    typer.echo(f"wrote {path}")
    if show:
        _open(path)


def _require_writable(folder: Path) -> None:
    try:
        Path(tempfile.mkdtemp(prefix=".report.", dir=folder)).rmdir()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): copy the run folder to where you may write"
        ) from error


def _open(path: Path) -> None:
    """In the browser; where there is no display, or no browser, a line with the address."""
    address = path.resolve().as_uri()
    headless = sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if headless:
        typer.echo(f"no display here, so no browser was opened; the report is {address}")
    elif typer.launch(address):
        typer.echo(f"no browser could be opened; the report is {address}")
