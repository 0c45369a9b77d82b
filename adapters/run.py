"""The stages of a run in order: load, sample, predict, measure, check, write."""

from pathlib import Path
from typing import NamedTuple

import torch

import funcprobe
from funcprobe import checks, sampler_checks
from funcprobe.policy.layout import response_mask, select
from funcprobe.policy.reference import LAST_FACTOR
from funcprobe.types import TokenStats

from . import rollouts, sinks, store
from .checkpoint.model import Loader
from .config.file import to_toml
from .config.schema import Config
from .console import Narrator
from .machine.cost import counted
from .machine.precision import products
from .report.afterwards import report_afterwards
from .results.attribution import attribution_section
from .results.attribution_tables import write_tables
from .results.document import document
from .results.influence import influence_section
from .results.manifest import manifest
from .results.momentum import momentum_section
from .results.schema import Results
from .stages.attribution import attributed
from .stages.batches import Batches
from .stages.first_order import predicted
from .stages.forecast import forecast, forecast_line, peak_memory
from .stages.influence import influences
from .stages.momentum import momentum_of
from .stages.observables import Asked, asked_for, functions_of_E, observe
from .stages.plan import Plan, load
from .stages.recorded_steps import RecordedSteps, recorded_steps
from .stages.sweep import measure_sweep
from .store import Stages


class Prepared(NamedTuple):
    """A run before its first pass: everything that can be rejected has been."""

    plan: Plan  # with the hashes of all its inputs
    asked: Asked
    recorded: RecordedSteps | None
    folder: Path


def run(config: Config, narrator: Narrator, *, fresh: bool = False) -> tuple[Results, Path]:
    """The whole probe; returns the results and the run folder, which is whole or absent."""
    prepared = prepare(config, narrator)
    _foretell(prepared, narrator, fresh=fresh)
    return probe(prepared, narrator, fresh=fresh)


def prepare(config: Config, narrator: Narrator, policy_of: Loader | None = None) -> Prepared:
    """Load, the policy by `policy_of` if given, and check: InputError for what a run would reject."""
    folder = run_folder(config)
    store.require_writable(folder)
    sinks.require(config.log)
    plan = load(config, narrator, policy_of)
    asked = asked_for(plan)
    recorded = recorded_steps(plan, narrator)
    inputs = plan.inputs | {"momentum": recorded.inputs if recorded else {}}
    return Prepared(plan._replace(inputs=inputs), asked, recorded, folder)


def probe(prepared: Prepared, narrator: Narrator, *, fresh: bool = False) -> tuple[Results, Path]:
    """From sampling to the run folder."""
    plan, asked, recorded, folder = prepared
    stages = Stages(folder.parent / ".stages", fresh)
    versions = _versions(plan.policy.model)
    with products(plan.config.policy.precision):
        found = predicted(plan, stages, narrator)
        plan, batches, evidence, _, prediction, unit_N = found
        f = functions_of_E(found, asked, narrator)
        attribution = attributed(found, stages, narrator)
        influence = influences(found, attribution, stages, narrator)
        momentum = momentum_of(found, recorded, stages, narrator)
        sweep = measure_sweep(plan, batches, prediction, unit_N, stages, narrator)
        observed = observe(found, asked, f, sweep, stages, narrator)
        seen = check(plan, batches, prediction, evidence, narrator)
    seen.append(_untouched(versions, plan.policy.model))
    section = attribution_section(found, attribution)
    results = document(
        *(plan, batches, prediction, evidence, unit_N, sweep, seen, narrator.costs),
        observed,
        section,
        momentum_section(found, momentum),
    )
    results = results.model_copy(update={"influence": influence_section(found, influence)})
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


def _foretell(prepared: Prepared, narrator: Narrator, *, fresh: bool = False) -> None:
    """Say what the run will take, before it starts."""
    plan, asked = prepared.plan, prepared.asked
    with products(plan.config.policy.precision):
        found = forecast(plan, narrator, kl="kl_base" in asked.names)
    stored = not fresh and (prepared.folder.parent / ".stages").is_dir()
    narrator.say(forecast_line(found, stored=stored))
    narrator.expect(found.seconds)


def dry_run(config: Config, narrator: Narrator) -> Plan:
    """Everything that can be rejected before sampling; writes nothing."""
    prepared = prepare(config, narrator)
    _foretell(prepared, narrator)
    if (peak := peak_memory(prepared.plan)) is not None:
        narrator.say(f"about {peak / 2**30:.1f} GiB of memory at its peak, the model included")
    return prepared.plan


def check_alone(config: Config, narrator: Narrator) -> list[checks.Check]:
    """The sanity checks on separate, small batches; writes nothing."""
    small = {"B_E": min(config.sampling.B_E, 32), "B_U": min(config.sampling.B_U, 8)}
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update=small)})
    plan = load(config, narrator)
    versions = _versions(plan.policy.model)
    with products(config.policy.precision):
        plan, batches, evidence, _, prediction, _ = predicted(plan, Stages(None), narrator)
        seen = check(plan, batches, prediction, evidence, narrator)
    return [*seen, _untouched(versions, plan.policy.model)]


def run_folder(config: Config) -> Path:
    """The folder to which a run of this configuration is written."""
    return Path(config.run.folder).expanduser() / config.run.name


def check(
    plan: Plan,
    batches: Batches,
    prediction: funcprobe.Prediction,
    evidence: funcprobe.Evidence | None,
    narrator: Narrator,
) -> list[checks.Check]:
    """The sanity checks, on the run's batches (the slow ones on 32 sequences of E)."""
    params, max_tokens = plan.policy.params, plan.max_tokens
    few = torch.arange(min(32, len(batches.eval_batch.prompt_N)))
    part = select(batches.eval_batch, few)
    few_logp_NR = None if batches.sampler_logp_NR is None else batches.sampler_logp_NR[few]
    if few_logp_NR is not None:
        few_logp_NR = few_logp_NR[:, : response_mask(part).shape[1]]
    v = prediction.direction.total
    moves = batches.update.moves
    if not moves:
        why = "every advantage is 0" if plan.loss is None else "the loss has no gradient on U"
        narrator.say(f"{why}: the checks of the gradient Y are left out")
    with narrator.phase("sanity checks") as stage:
        forward = counted(plan.forward, stage, "E")
        stats = funcprobe.token_stats(params, part, forward, max_tokens)
        plain64 = forward.coarsest == torch.float64 and plan.config.policy.mode == "lora"
        return [
            *([checks.float64_throughout(plan.policy.model, part)] if plain64 else []),
            *(
                [checks.adapter_changes_logits(params, part, stats, forward, max_tokens)]
                if any(LAST_FACTOR.search(name) for name in params)  # else no adapter
                else []
            ),
            checks.gradients_reach("X", prediction.X),
            *([checks.gradients_reach("Y", prediction.Y)] if moves else []),
            checks.routes_agree(prediction, plan.forward),
            checks.alpha_cases(params, part, v, forward, max_tokens),
            *(_of_the_state(plan, prediction, evidence) if moves else []),
            checks.eta_zero(
                params,
                part,
                v,
                stats,
                forward,
                entropy=plan.entropy._replace(baseline="auto"),  # ridge may need more prompts
                max_tokens=max_tokens,
                sampler_logp_NR=few_logp_NR,
            ),
            checks.repeat_is_identical(params, part, stats, forward, max_tokens),
            *_samplers(plan, batches, prediction, few_logp_NR),
        ]


def _of_the_state(
    plan: Plan, prediction: funcprobe.Prediction, evidence: funcprobe.Evidence | None
) -> list[checks.Check]:
    """Checks of the optimizer's state against the gradient; none if the rule reads no state."""
    if evidence is None:
        return []
    clip = prediction.direction.clip_coefficient
    scale = funcprobe.gradient_scale(prediction.Y, plan.adam_state, clip)
    return [checks.state_fits(evidence), checks.gradient_in_proportion(scale)]


def _samplers(
    plan: Plan,
    batches: Batches,
    prediction: funcprobe.Prediction,
    few_logp_NR: torch.Tensor | None,
) -> list[checks.Check]:
    """Whether all of E, and a supplied U, have the distributions that are assumed of them.

    `few_logp_NR`: the sampler's log-probabilities of E's first responses, if E has them.
    """
    E, stats, logp_NR = batches.eval_batch, prediction.stats, batches.sampler_logp_NR
    seen = []
    if logp_NR is None or few_logp_NR is None:
        seen = [sampler_checks.sampled_from_policy(E, stats)]
    else:
        own = sampler_checks.sampler_logp_is_its_own(E, stats, logp_NR)
        if not own.passed and plan.temperature != 1:
            part, width = select(E, torch.arange(len(few_logp_NR))), few_logp_NR.shape[1]
            params = plan.policy.params
            at_1 = funcprobe.frozen_forward(plan.policy.model, params, 1.0, "packed")
            raw = funcprobe.token_stats(params, part, at_1, plan.max_tokens)
            few = TokenStats(*(x_NR[: len(few_logp_NR), :width] for x_NR in stats))
            own = sampler_checks.explained_by_temperature(own, part, few, raw, few_logp_NR)
        seen = [sampler_checks.sampler_near_policy(E, stats, logp_NR), own]
    if _is_own_sample(plan, batches):
        seen.append(
            sampler_checks.sampled_from_policy(batches.update.batch, prediction.update_stats, "U")
        )
    return seen


def _is_own_sample(plan: Plan, batches: Batches) -> bool:
    """Whether a supplied U is said to be sampled from theta, and was passed.

    It is not if it has log-probabilities of the policy before, or tokens that no policy sampled.
    """
    found = plan.supplied_update
    if found is None or not batches.update.moves or found.old_logp is not None:
        return False
    return found.loss_mask is None or all(map(all, found.loss_mask))


def _versions(model: torch.nn.Module) -> dict[str, int]:
    """PyTorch's count of in-place changes, of every tensor."""
    return {n: t._version for n, t in (*model.named_parameters(), *model.named_buffers())}


def _untouched(before: dict[str, int], model: torch.nn.Module) -> checks.Check:
    after = _versions(model)
    changed = sum(before[n] != after.get(n) for n in before)
    return checks.Check(
        "the model's weights are untouched",
        changed == 0 and before.keys() == after.keys(),
        f"{changed} of {len(before)} parameters and buffers modified",
        "0",
        "a module that modifies its own buffers in the forward",
    )
