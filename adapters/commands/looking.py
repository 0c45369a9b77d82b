"""report: what reads run folders."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from funcprobe.types import InputError

from ..machine.home import expanded
from .app import open_page


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as runs/quickstart.")],
    show: Annotated[
        bool, typer.Option("--open", help="Open it in the browser, where there is a display.")
    ] = False,
) -> None:
    """Write report.html and figures/ of a run folder again, also of an earlier version's.

    With the rules that `funcprobe whatif` has compared since. Nothing is computed by the model.
    """
    folder = expanded(folder)
    if (folder / "results.json").is_file():  # else `write_report` says what was expected
        _require_writable(folder)
    from ..report.write import write_report

    path = write_report(folder)
    typer.echo(f"wrote {path}")
    if show:
        open_page(path)


def _require_writable(folder: Path) -> None:
    try:
        Path(tempfile.mkdtemp(prefix=".report.", dir=folder)).rmdir()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): copy the run folder to where you may write"
        ) from error
