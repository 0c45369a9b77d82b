"""cache: the stored stages of runs, listed and cleared."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from funcprobe.types import InputError

from ..machine.home import expanded
from .app import stdout

if TYPE_CHECKING:
    from ..store import Stored


def cache(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="run.folder of the configuration.")
    ] = Path("runs"),
    older_than: Annotated[
        float | None,
        typer.Option(min=0, metavar="DAYS", help="Only stages that were not used for so many days."),
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete what is listed; but stages of runs in progress.")
    ] = False,
) -> None:
    """List the stored stages of FOLDER/.stages: size, time since the last use, run; or clear them.

    A deleted stage is computed again when a run needs it. The least recently used come first; runs
    delete those by themselves beyond run.cache_size and run.cache_days.
    """
    from .. import store

    folder = expanded(folder)
    place = folder if folder.name == store.FOLDER else folder / store.FOLDER
    if not place.is_dir():
        raise InputError(f"there is no {place}: give the folder of the runs, as run.folder has it")
    if clear:
        freed = store.clear(place, lambda line: typer.echo(line, err=True), older_than)
        _list(freed.deleted, f"deleted from {place}")
        if freed.kept:
            typer.echo(f"kept, as a run in progress uses them: {_sum(freed.kept)}")
        return
    now = time.time()
    found = store.stored(place)
    if older_than is not None:
        found = [one for one in found if one.age(now) > older_than * 86_400]
    _list(found, f"in {place}")


def _list(found: "list[Stored]", where: str) -> None:
    if found:
        table, now = Table(box=None), time.time()
        table.add_column("stage")
        table.add_column("size", justify="right")
        table.add_column("last used", justify="right")
        table.add_column("run")
        table.add_column("")
        for one in found:
            notes = ["in use"] * one.in_use + ["unfinished"] * one.progress
            own = one.run or "not known"
            table.add_row(one.stage, _size(one.size), _ago(one.age(now)), own, ", ".join(notes))
        stdout().print(table)
    typer.echo(f"{_sum(found)} {where}")


def _sum(found: "list[Stored]") -> str:
    count = len(found)
    return f"{count} stage{'' if count == 1 else 's'}, {_size(sum(one.size for one in found))}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit} ago"
    return f"{seconds:.0f} s ago"
