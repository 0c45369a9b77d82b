"""run, whatif, check: what passes a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from funcprobe.rules import registry

from ..config.file import read_config
from ..console import Narrator
from ..results.check_words import outcome, print_checks
from ..results.tables import print_results
from .app import ConfigPath, Overrides, Verbose, stdout, world

if TYPE_CHECKING:
    from ..stages.plan import Plan


def run(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load, check and plan; sample and write nothing.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute every stage again, also those already stored.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Predict and measure the entropy change of the next step; write RUN.FOLDER/RUN.NAME.

    Stages whose inputs have not changed are read from RUN.FOLDER/.stages. Started by torchrun or
    accelerate launch, all processes share the work (docs/distributed.md).
    """
    parsed = read_config(config, overrides or ())
    ranks = world()
    narrator = Narrator(processes=ranks.size)
    with narrator.phase("import"):
        from .. import run as probe  # imports transformers and peft, not needed for --help
        from .. import sinks
        from ..stages.holding import run_folder

    if dry_run:
        _print_plan(probe.dry_run(parsed, narrator, ranks), run_folder(parsed))
        return
    results, folder = probe.run(parsed, narrator, fresh=fresh, world=ranks)
    if not ranks.first:
        return
    page = folder / "report.html"
    print_results(results, stdout(), verbose=verbose, report=page if page.is_file() else None)
    total = sum(cost.seconds for cost in narrator.costs.values())
    narrator.say(f"wrote {folder} in {total:.1f} s")
    sinks.send(folder, narrator)


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
    verbose: Verbose = False,
) -> None:
    """Compare rules of the next step on the same E and U: entropy and reward, predicted and measured.

    A gradient pass over U and a forward over E for each rule; what a run of the same configuration
    stored, and rules that were asked for before, are read from RUN.FOLDER/.stages.
    """
    parsed = read_config(config, overrides or ())
    asked = (*(rules or ()), *(f"mask:{condition}" for condition in masks or ()))
    for text in asked or parsed.whatif.rules:
        registry.rule(text)  # what is wrong is said before the slow imports
    ranks = world()
    narrator = Narrator(processes=ranks.size)
    with narrator.phase("import"):
        from .. import whatif as command
        from ..results.whatif_table import print_whatif

    question = command.Question(asked, solve, by, eta, out)
    document, path = command.whatif(parsed, question, narrator, fresh=fresh, world=ranks)
    if not ranks.first:
        return
    print_whatif(document, stdout(), verbose=verbose)
    total = sum(cost.seconds for cost in narrator.costs.values())
    narrator.say(f"wrote {path} in {total:.1f} s")


def check(config: ConfigPath, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Run the sanity checks alone, on small batches; write nothing. Exit status 1 if one fails."""
    parsed = read_config(config, overrides or ())
    from .. import run as probe

    ranks = world()
    seen = probe.check_alone(parsed, Narrator(processes=ranks.size), ranks)
    print_checks(seen, stdout(), verbose=verbose)
    if any(outcome(one) == "FAIL" for one in seen):
        raise typer.Exit(1)


def _print_plan(plan: "Plan", folder: Path) -> None:
    sampling, supplied = plan.config.sampling, plan.config.rollouts
    drawn = f"{sampling.B_E} prompts drawn from {len(plan.prompts)} with replacement, one response each"
    eval_source = supplied.eval or drawn
    update_source = supplied.update or f"{sampling.B_U} distinct prompts, {sampling.G} responses each"
    typer.echo(f"E: {eval_source}")
    typer.echo(f"U: {update_source}")
    if plan.prompt_ids:
        from ..stages.large_prompts import known

        longest = max(len(ids) for ids in known(plan.prompt_ids))
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
