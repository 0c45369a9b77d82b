"""sweep, compare: several runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..config.file import read_config
from ..console import Narrator, one_line
from ..machine.home import expanded
from .app import ConfigPath, Overrides, open_page, stdout, world


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
    together: Annotated[
        int,
        typer.Option(
            "--ranks-per-checkpoint",
            min=1,
            help="Under torchrun or accelerate launch: processes that share a checkpoint. One is "
            "fastest, where the model fits.",
        ),
    ] = 1,
) -> None:
    """Run every checkpoint of a training with one configuration, the base loaded once.

    Writes RUN.FOLDER/RUN.NAME-<step> each. Checkpoints of the same configuration and inputs that are
    there are kept; one that fails does not stop the others. Exit status 2 if one did. At the end the
    runs are compared: RUN.FOLDER/RUN.NAME.compare.html and .json. Started by torchrun or accelerate
    launch, every process takes the next checkpoint that none has taken.
    """
    parsed = read_config(config, overrides or ())
    ranks = world()
    narrator = Narrator()
    with narrator.phase("import"):
        from .. import sweep as command  # imports transformers and peft, not needed for --help

    outcomes = command.sweep(parsed, checkpoints, narrator, fresh=fresh, world=ranks, together=together)
    if not ranks.first:
        return
    failed = [one for one in outcomes if one.failed is not None]
    done = [one.folder for one in outcomes if one.failed is None]
    try:
        if len(done) > 1:
            from ..compare import compare_runs
            from ..results.comparison_words import print_comparison

            written = compare_runs(done, done[0].parent, f"{parsed.run.name}.compare")
            print_comparison(written.comparison, stdout())
            narrator.say(f"wrote {written.html} and {written.json.name}")
    finally:
        for one in failed:
            typer.echo(f"funcprobe: {one_line(f'{one.checkpoint} failed: {one.failed}')}", err=True)
    if failed:
        raise typer.Exit(2)


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN ...", help="Run folders, as runs/mine-*.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where to write compare.html and .json.")
    ] = Path(),
    name: Annotated[str, typer.Option(help="Of the two files, without their suffixes.")] = "compare",
    log: Annotated[
        Path | None,
        typer.Option(help="trainer_state.json of the training. Default: the last checkpoint's."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Compare runs: checkpoints of a training, learning rates, rules, models.

    Checkpoints of one training are ordered by step, with the entropy that was predicted, measured and
    logged on the way; other runs by what differs in their configurations.
    """
    from ..compare import compare_runs
    from ..results.comparison_words import print_comparison

    written = compare_runs(runs, expanded(out), name, log)
    print_comparison(written.comparison, stdout())
    typer.echo(f"wrote {written.html} and {written.json.name}")
    if show:
        open_page(written.html)
