"""The command line: run, whatif, check, inspect, init."""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from funcprobe.types import InputError

from .config.file import commented_config, read_config
from .console import Narrator
from .machine.allocator import keep_freed_memory
from .results.tables import print_checks, print_results, verdict

if TYPE_CHECKING:
    from .stages.plan import Plan

ABOUT = (
    "Predicts and measures how the next optimizer step changes the entropy of a policy in RL training: "
    "to first order with a standard error, and by importance sampling, without taking the step."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

INTERRUPTED = 130  # 128 + SIGINT, as in shells


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"funcprobe {metadata.version('funcprobe')}")
        raise typer.Exit


@app.callback(help=ABOUT)
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options before a command."""


ConfigPath = Annotated[
    Path, typer.Argument(metavar="CFG.TOML", help="Configuration file; funcprobe init writes one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the configuration, as in --set sampling.B_E=64. May be repeated.",
    ),
]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load, check and plan; sample and write nothing.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute every stage again, also those already stored.")
    ] = False,
) -> None:
    """Predict and measure the entropy change of the next step; write RUN.FOLDER/RUN.NAME.

    Stages whose inputs have not changed are read from RUN.FOLDER/.stages.
    """
    parsed = read_config(config, overrides or ())
    narrator = Narrator()
    with narrator.phase("import"):
        from . import run as probe  # imports transformers and peft, not needed for --help

    if dry_run:
        _print_plan(probe.dry_run(parsed, narrator), probe.run_folder(parsed))
        return
    results, folder = probe.run(parsed, narrator, fresh=fresh)
    print_results(results, _stdout())
    total = sum(cost.seconds for cost in narrator.costs.values())
    narrator.say(f"wrote {folder} in {total:.1f} s")


@app.command()
def whatif(
    config: ConfigPath,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="NAME[:ARG]",
            help="A rule to compare, as entropy_bonus:0.01 or top_entropy:0.2 (docs/rules.md). May be "
            "repeated. Default: whatif.rules of the configuration.",
        ),
    ] = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            "--mask",
            metavar="CONDITION",
            help='Keep the tokens for which it holds, as "advantage > 0 or surprisal < 4". Short for '
            "--rule mask:CONDITION. May be repeated.",
        ),
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            metavar="entropy=VALUE",
            help="Find the coefficient at which this change of the entropy is predicted, as entropy=0.",
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="NAME",
            help="With --solve: whose coefficient; entropy_bonus, kl_penalty, kl_penalty_k2, or of a "
            "share, top_entropy, steer.",
        ),
    ] = "entropy_bonus",
    eta: Annotated[
        float | None, typer.Option(help="Learning rate of the step. Default: that of the next step.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: RUN.FOLDER/RUN.NAME.whatif.json.")
    ] = None,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute every stage again, also those already stored.")
    ] = False,
) -> None:
    """Compare rules of the next step on the same E and U: entropy and reward, predicted and measured.

    A gradient pass over U and a forward over E for each rule; what a run of the same configuration
    stored, and rules that were asked for before, are read from RUN.FOLDER/.stages.
    """
    parsed = read_config(config, overrides or ())
    narrator = Narrator()
    with narrator.phase("import"):
        from . import whatif as command
        from .results.whatif_table import print_whatif

    asked = (*(rules or ()), *(f"mask:{condition}" for condition in masks or ()))
    question = command.Question(asked, solve, by, eta, out)
    document, path = command.whatif(parsed, question, narrator, fresh=fresh)
    print_whatif(document, _stdout())
    total = sum(cost.seconds for cost in narrator.costs.values())
    narrator.say(f"wrote {path} in {total:.1f} s")


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the sanity checks alone, on small batches; write nothing. Exit status 1 if one fails."""
    parsed = read_config(config, overrides or ())
    from . import run as probe

    seen = probe.check_alone(parsed, Narrator())
    print_checks(seen, _stdout())
    if any(verdict(one) == "FAIL" for one in seen):
        raise typer.Exit(1)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("funcprobe.toml"),
    checkpoint: Annotated[
        Path | None, typer.Option("--from", help="Checkpoint folder to write a configuration for.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="With --from: file or data set with the run's prompts.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set that has several.")] = "train",
    prompt_column: Annotated[
        str | None, typer.Option(help="Column with the prompts, if not prompt, question, ...")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="The run's reward, as path/to/file.py:function; else a built-in one."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write, as PATH.")] = None,
) -> None:
    """Write a configuration file with every key, its default and its description.

    With --from and --prompts, one that runs as it is: with the settings of that checkpoint's run, as
    far as they are recorded, and a comment on each.
    """
    path = out or path
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file in it")
    if path.exists():
        raise InputError(f"{path} exists: give another name, or delete it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}: create it, or give another name")
    if (checkpoint is None) != (prompts is None):
        raise InputError("--from CHECKPOINT and --prompts SOURCE are given together, or neither is")
    if checkpoint is None or prompts is None:
        text, then = commented_config(), "edit it"
    else:
        from .proposal import propose

        text = propose(
            checkpoint.expanduser(), prompts, split=split, prompt_column=prompt_column, reward=reward
        )
        then = "read its comments"
    path.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {path}: {then}, then run: funcprobe run {path}")


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or file or folder of an optimizer state.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model, instead of the one saved with the adapter.")
    ] = None,
    adapter: Annotated[
        str, typer.Option(help='Name of the adapter; unless "default", its subfolder.')
    ] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe an optimizer state: format, names and their certainty, coverage, statistics.

    Positions are named by the configurations of adapter and base; no weights are read.
    """
    from . import inspection

    document = inspection.inspect(path.expanduser(), base=base, adapter=adapter)
    if as_json:
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        inspection.show(document, _stdout())


def main() -> None:
    """Entry point. A rejected input gives one line on stderr and exit status 2."""
    keep_freed_memory()
    try:
        app(prog_name="funcprobe")
    except InputError as error:
        _fail(str(error))
    except OSError as error:  # an unwritable folder, a full disk
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; no incomplete file was left")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's, on KeyboardInterrupt
            typer.echo(
                "funcprobe: interrupted; finished stages are stored, no incomplete file was left",
                err=True,
            )
        raise


def _stdout() -> Console:
    """As wide as the terminal; in a file or a pipe, as wide as the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _print_plan(plan: "Plan", folder: Path) -> None:
    sampling, supplied = plan.config.sampling, plan.config.rollouts
    drawn = f"{sampling.B_E} prompts drawn from {len(plan.prompts)} with replacement, one response each"
    eval_source = supplied.eval or drawn
    update_source = supplied.update or f"{sampling.B_U} distinct prompts, {sampling.G} responses each"
    typer.echo(f"E: {eval_source}")
    typer.echo(f"U: {update_source}")
    if plan.prompt_ids:
        longest = max(len(ids) for ids in plan.prompt_ids)
        typer.echo(f"longest prompt: {longest} tokens; responses: up to {sampling.max_new_tokens}")
    divisor = plan.objective.normalisation
    by = f"normalisation {divisor}"
    if plan.loss is not None:
        kind = plan.loss.settings.get("loss_type") or plan.loss.settings.get("loss_mode") or ""
        by = f"loss {plan.loss.name} {kind}".rstrip()
    objective = f"advantage {plan.objective.advantage}, {by}"
    typer.echo(f"step: {plan.step.rule}, next lr {plan.next_lr:g}; objective: {objective}")
    typer.echo(f"measured at eta = {', '.join(f'{eta:g}' for eta in plan.etas)}")
    typer.echo(f"a run would write {folder}; nothing was sampled or written")


def _fail(message: str) -> None:
    typer.echo("funcprobe: " + " ".join(message.split()), err=True)
    sys.exit(2)
