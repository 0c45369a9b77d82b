"""report: what reads run folders."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as runs/quickstart.")],
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write report.html and figures/ of a run folder again, also of an earlier version's."""
    from ..report.write import write_report

    path = write_report(folder.expanduser())
    typer.echo(f"wrote {path}")
    if show:
        typer.launch(str(path))
