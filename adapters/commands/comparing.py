"""sweep, compare: several runs."""

from typing import Annotated

import typer

from ..config.file import read_config
from ..console import Narrator
from .app import ConfigPath, Overrides


def sweep(
    config: ConfigPath,
    checkpoints: Annotated[
        list[str],
        typer.Option(
            "--checkpoints",
            metavar="GLOB",
            help="Checkpoint folders of a training, in quotes, as 'out/checkpoint-*'; relative to the "
            "current directory. May be repeated. toy: those of the built-in policy.",
        ),
    ],
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run every checkpoint again, also those already there.")
    ] = False,
) -> None:
    """Run every checkpoint of a training with one configuration, in one process, the base loaded once.

    Writes RUN.FOLDER/RUN.NAME-<step> each. Checkpoints of the same configuration and inputs that are
    there are kept; one that is rejected does not stop the others. Exit status 2 if one was.
    """
    parsed = read_config(config, overrides or ())
    narrator = Narrator()
    with narrator.phase("import"):
        from .. import sweep as command  # imports transformers and peft, not needed for --help

    outcomes = command.sweep(parsed, checkpoints, narrator, fresh=fresh)
    failed = [one for one in outcomes if one.failed is not None]
    for one in failed:
        typer.echo(f"funcprobe: {one.checkpoint} failed: {one.failed}", err=True)
    if failed:
        raise typer.Exit(2)
