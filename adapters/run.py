"""The stages of a run in order: load, sample, predict, measure, check, write."""

from pathlib import Path
from typing import NamedTuple

from funcprobe import checks

from . import rollouts, sinks, store
from .checkpoint.model import Loader
from .config.file import to_toml
from .config.schema import Config
from .console import Narrator
from .machine.cost import together
from .machine.precision import products
from .machine.ranks import ONE_PROCESS, World
from .report.afterwards import report_afterwards
from .results.attribution import attribution_section
from .results.attribution_tables import write_tables
from .results.document import document
from .results.influence import influence_section
from .results.manifest import manifest
from .results.momentum import momentum_section
from .results.schema import Results
from .stages.attribution import attributed
from .stages.checks import check, untouched, versions_of
from .stages.everywhere import require_same
from .stages.first_order import predicted
from .stages.forecast import forecast, forecast_line, peak_memory
from .stages.holding import holding, run_folder, stages_of
from .stages.influence import influences
from .stages.microbatch import STAGE as SIZE
from .stages.momentum import momentum_of
from .stages.observables import Asked, asked_for, functions_of_E, observe
from .stages.plan import Plan, load
from .stages.recorded_steps import RecordedSteps, recorded_steps
from .stages.sweep import measure_sweep
from .stages.unchanged import Sources, loaded, require_unchanged
from .store import Stages


class Prepared(NamedTuple):
    """A run before its first pass: everything that can be rejected has been."""

    plan: Plan  # with the hashes of all its inputs
    asked: Asked
    recorded: RecordedSteps | None
    folder: Path
    stages: Stages
    sources: Sources  # the files that were read


def run(
    config: Config, narrator: Narrator, *, fresh: bool = False, world: World = ONE_PROCESS
) -> tuple[Results, Path]:
    """The whole probe; returns the results and the run folder, which is whole or absent."""
    with holding(config, narrator, world, fresh=fresh) as stages:
        prepared = prepare(config, narrator, stages)
        _foretell(prepared, narrator)
        return probe(prepared, narrator)


def prepare(
    config: Config, narrator: Narrator, stages: Stages, policy_of: Loader | None = None
) -> Prepared:
    """Load, the policy by `policy_of` if given, and check: InputError for what a run would reject."""
    folder = run_folder(config)
    if stages.world.first:
        store.require_writable(folder)
        sinks.require(config.log)
    plan, sources = loaded(config, narrator, stages, policy_of)
    asked = asked_for(plan)
    recorded = recorded_steps(plan, narrator)
    inputs = plan.inputs | {"momentum": recorded.inputs if recorded else {}}
    require_same(config, inputs, stages.world)
    return Prepared(plan._replace(inputs=inputs), asked, recorded, folder, stages, sources)


def probe(prepared: Prepared, narrator: Narrator) -> tuple[Results, Path]:
    """From sampling to the run folder."""
    plan, asked, recorded, folder, stages, sources = prepared
    before = versions_of(plan.policy.model)
    with products(plan.config.policy.precision):
        found = predicted(plan, stages, narrator)
        plan, batches, evidence, _, prediction, unit_N = found
        f = functions_of_E(found, asked, narrator)
        attribution = attributed(found, stages, narrator)
        influence = influences(found, attribution, stages, narrator)
        momentum = momentum_of(found, recorded, stages, narrator)
        sweep = measure_sweep(plan, batches, prediction, unit_N, stages, narrator)
        observed = observe(found, asked, f, sweep, stages, narrator)
        seen = check(found, stages, narrator)
    of_ranks = plan.world.gathered(untouched(before, plan.policy.model))
    seen.append(next((one for one in of_ranks if not one.passed), of_ranks[0]))
    section = attribution_section(found, attribution)
    costs = together(narrator.costs, plan.world)
    results = document(
        *(plan, batches, prediction, evidence, unit_N, sweep, seen, costs),
        observed,
        section,
        momentum_section(found, momentum),
    )
    results = results.model_copy(update={"influence": influence_section(found, influence)})
    if not plan.world.first:
        return results, folder
    require_unchanged(sources, narrator)
    with store.run_folder(folder) as target:
        (target / "config.toml").write_text(to_toml(plan.config), encoding="utf-8")
        (target / "rollouts").mkdir()
        evaluated = batches.eval_rollouts
        if "reward" in f:
            evaluated = evaluated._replace(reward=f["reward"].tolist())
        rollouts.save_rollouts(evaluated, target / "rollouts" / "eval.parquet")
        rollouts.save_rollouts(batches.update_rollouts, target / "rollouts" / "update.parquet")
        for point in sweep.points:
            if point.fresh is not None:
                path = target / "rollouts" / f"eval-at-{point.eta:g}.parquet"
                rollouts.save_rollouts(point.fresh.rollouts, path)
        if attribution is not None:
            write_tables(found, attribution, target)
        store.save_params(prediction.direction.total, target / "direction.safetensors")
        store.write_json(results.model_dump(mode="json"), target / "results.json")
        store.write_json(manifest(plan).model_dump(mode="json"), target / "manifest.json")
        (target / "run.log").write_text("\n".join(narrator.lines) + "\n", encoding="utf-8")
    if plan.config.run.report:
        report_afterwards(folder, narrator)
    return results, folder


def _foretell(prepared: Prepared, narrator: Narrator) -> None:
    """Say what the run will take, before it starts."""
    plan, asked, stages = prepared.plan, prepared.asked, prepared.stages
    if not plan.world.first:
        return
    with products(plan.config.policy.precision):
        found = forecast(plan, narrator, kl="kl_base" in asked.names)
    left = store.stored(prepared.folder.parent / store.FOLDER)
    stored = not stages.fresh and any(one.stage != SIZE for one in left)
    narrator.say(forecast_line(found, stored=stored))
    narrator.expect(found.seconds)


def dry_run(config: Config, narrator: Narrator, world: World = ONE_PROCESS) -> Plan:
    """Everything that can be rejected before sampling; writes nothing."""
    stages = stages_of(config, narrator, world)._replace(writes=False)
    prepared = prepare(config, narrator, stages)
    _foretell(prepared, narrator)
    if world.first and (peak := peak_memory(prepared.plan)) is not None:
        narrator.say(f"about {peak / 2**30:.1f} GiB of memory at its peak, the model included")
    return prepared.plan


def check_alone(config: Config, narrator: Narrator, world: World = ONE_PROCESS) -> list[checks.Check]:
    """The sanity checks on separate, small batches; writes nothing."""
    small = {"B_E": min(config.sampling.B_E, 32), "B_U": min(config.sampling.B_U, 8)}
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update=small)})
    stages = stages_of(config, narrator, world)._replace(writes=False)
    plan = load(config, narrator, stages=stages)
    require_same(config, plan.inputs, world)
    before = versions_of(plan.policy.model)
    with products(config.policy.precision):
        seen = check(predicted(plan, Stages(None), narrator), Stages(None), narrator)
    return [*seen, untouched(before, plan.policy.model)]
