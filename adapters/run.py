"""The stages of a run in order: load, sample, predict, measure, check, write."""

from pathlib import Path

import torch

import funcprobe
from funcprobe import checks, sampler_checks, tree
from funcprobe.policy.layout import response_mask, select
from funcprobe.policy.reference import LAST_FACTOR
from funcprobe.statistics import baselines
from funcprobe.types import Params, TokenStats

from . import rollouts, store
from .checkpoint.padding import as_trained
from .config.file import to_toml
from .config.schema import Config
from .console import Narrator
from .machine.cost import Stage, counted
from .machine.precision import products
from .results.document import document
from .results.manifest import manifest
from .results.schema import Results
from .stages.batches import Batches, sample
from .stages.gradient import gradients_on_U, verify_state
from .stages.loss import with_loss
from .stages.plan import Plan, load
from .stages.sweep import LEAVES, STATS, measure_sweep, state_inputs
from .store import Stages


def run(config: Config, narrator: Narrator, *, fresh: bool = False) -> tuple[Results, Path]:
    """The whole probe; returns the results and the run folder, which is whole or absent."""
    folder = run_folder(config)
    store.require_writable(folder)
    plan = load(config, narrator)
    stages = Stages(folder.parent / ".stages", fresh)
    versions = _versions(plan.policy.model)
    with products(config.policy.precision):
        plan, batches, evidence, prediction = _predicted(plan, stages, narrator)
        unit_N = _units(plan, batches)
        sweep = measure_sweep(plan, batches, prediction, unit_N, stages, narrator)
        seen = check(plan, batches, prediction, evidence, narrator)
    seen.append(_untouched(versions, plan.policy.model))
    results = document(plan, batches, prediction, evidence, unit_N, sweep, seen, narrator.costs)
    with store.run_folder(folder) as target:
        (target / "config.toml").write_text(to_toml(plan.config), encoding="utf-8")
        (target / "rollouts").mkdir()
        rollouts.save_rollouts(batches.eval_rollouts, target / "rollouts" / "eval.parquet")
        rollouts.save_rollouts(batches.update_rollouts, target / "rollouts" / "update.parquet")
        for point in sweep.points:
            if point.fresh is not None:
                path = target / "rollouts" / f"eval-at-{point.eta:g}.parquet"
                rollouts.save_rollouts(point.fresh.rollouts, path)
        store.save_params(prediction.direction.total, target / "direction.safetensors")
        store.write_json(results.model_dump(mode="json"), target / "results.json")
        store.write_json(manifest(plan).model_dump(mode="json"), target / "manifest.json")
        (target / "run.log").write_text("\n".join(narrator.lines) + "\n", encoding="utf-8")
    return results, folder


def dry_run(config: Config, narrator: Narrator) -> Plan:
    """Everything that can be rejected before sampling; writes nothing."""
    store.require_writable(run_folder(config))
    return load(config, narrator)


def check_alone(config: Config, narrator: Narrator) -> list[checks.Check]:
    """The sanity checks on separate, small batches; writes nothing."""
    small = {"B_E": min(config.sampling.B_E, 32), "B_U": min(config.sampling.B_U, 8)}
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update=small)})
    plan = load(config, narrator)
    versions = _versions(plan.policy.model)
    with products(config.policy.precision):
        plan, batches, evidence, prediction = _predicted(plan, Stages(None), narrator)
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
    moves = _moves(batches)
    if not moves:
        narrator.say("every advantage is 0: the checks of the gradient Y are left out")
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
    if found is None or not _moves(batches) or found.old_logp is not None:
        return False
    return found.loss_mask is None or all(map(all, found.loss_mask))


def _sampled(plan: Plan, stages: Stages, narrator: Narrator) -> tuple[Plan, Batches]:
    """E and U, and the plan with its baseline resolved for E."""
    batches = with_loss(plan, sample(plan, stages, narrator), stages, narrator)
    own = batches.sampler_logp_NR is None
    entropy = baselines.resolve(plan.entropy, batches.eval_batch, own_samples=own)
    return plan._replace(entropy=entropy), batches


def _predicted(
    plan: Plan, stages: Stages, narrator: Narrator
) -> tuple[Plan, Batches, funcprobe.Evidence | None, funcprobe.Prediction]:
    """From sampling to the prediction; the optimizer's state is verified before it is used."""
    plan, batches = _sampled(plan, stages, narrator)
    Y = gradients_on_U(plan, batches, stages, narrator)
    evidence = verify_state(plan, tree.mean(Y), narrator)
    return plan, batches, evidence, _predict(plan, batches, Y, stages, narrator)


def _predict(
    plan: Plan, batches: Batches, Y: tuple[Params, ...], stages: Stages, narrator: Narrator
) -> funcprobe.Prediction:
    with narrator.phase("first order", _sequences(batches)) as stage:
        return funcprobe.summarise(
            plan.policy.params,
            _passes(plan, batches, Y, stages, stage),
            batches.eval_batch,
            batches.update,
            plan.adam_state,
            entropy=plan.entropy,
            step=plan.step,
            sampler_logp_NR=batches.sampler_logp_NR,
            unit_N=_units(plan, batches),
        )


def _sequences(batches: Batches) -> int:
    """Sequences in the passes of first order: along v and X on E, along P X on U if Y is not 0."""
    over_U = len(batches.update.batch.prompt_N) if _moves(batches) else 0
    return 2 * len(batches.eval_batch.prompt_N) + over_U


def _moves(batches: Batches) -> bool:
    """Whether some advantage of U is not 0."""
    return batches.update.moves


def _units(plan: Plan, batches: Batches) -> torch.Tensor:
    """Sampling units of E: its draws, independent where it was sampled here; else its prompts.

    Drawn with replacement, two responses to one prompt are as independent as any two; prompts as units
    would count the variance between prompts twice if few prompts are drawn often.
    """
    prompt_N = batches.eval_batch.prompt_N
    return torch.arange(len(prompt_N)) if plan.supplied_eval is None else prompt_N


def _passes(
    plan: Plan, batches: Batches, Y: tuple[Params, ...], stages: Stages, stage: Stage
) -> funcprobe.Passes:
    params = plan.policy.params
    leaves = dict.fromkeys(params, LEAVES)
    baseline = None if plan.entropy.baseline == "none" else LEAVES
    like = funcprobe.Passes((leaves,) * len(Y), STATS, STATS, leaves, baseline, STATS, STATS, STATS)
    inputs = {
        **state_inputs(plan, batches),
        "coef": [batches.update.coef_NR, batches.update.entropy_coef_NR],
        "update": batches.update.batch,
        "optimizer": [plan.adam_state.exp_avg, plan.adam_state.exp_avg_sq, plan.adam_state.step],
        "groups": plan.adam_state.groups,
        "step": plan.step,
        "masks": [len(plan.masks), plan.config.run.seed] if plan.masks else 0,
        "entropy": plan.entropy,
        "passes": funcprobe.Passes._fields,
    }

    def compute() -> funcprobe.Passes:
        return funcprobe.first_order_passes(
            params,
            batches.eval_batch,
            batches.update,
            plan.adam_state,
            counted(plan.forward, stage, "E"),
            entropy=plan.entropy,
            step=plan.step,
            max_tokens=plan.max_tokens,
            sampler_logp_NR=batches.sampler_logp_NR,
            update_forward=counted(as_trained(plan.forward, plan.policy.padding), stage, "U"),
            Y=Y,
        )

    passes: funcprobe.Passes = stages.tensors("first-order", inputs, like, compute, stage.found)
    return passes


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
