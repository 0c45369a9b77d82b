"""What a run observes beside the entropy: at theta, along v, and at every learning rate."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64
from peft import PeftModel
from torch import Tensor

import funcprobe
from funcprobe.policy.layout import select
from funcprobe.policy.reference import base_params
from funcprobe.statistics import evaluation
from funcprobe.statistics.estimators import FirstOrder, Measured, entropy_influence
from funcprobe.statistics.evaluation import Evaluation
from funcprobe.statistics.intervals import Error, delta_error
from funcprobe.statistics.observables import of_response, of_sampled_tokens, of_tokens
from funcprobe.types import Baseline, Entropy, InputError, TokenStats

from ..config.estimation import observable_label
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..sampling.rewards import BUILT_IN, Reward, load_observable
from ..store import Stages
from .first_order import Predicted
from .kl import kl_of
from .like import like_stats
from .observed import rewards_of_E, values_on_E
from .plan import Plan, configured_reward
from .sweep import Point, Sweep, Tiny, noise_of, state_inputs

UNITS = {"reward": "reward", "correct": "share", "length": "tokens", "stop": "share"}


class Asked(NamedTuple):
    """The observables of a run, by the names of measure.observables."""

    names: tuple[str, ...]
    functions: dict[str, Reward]  # the user's own
    default: bool  # not named in the configuration: what cannot be had is left out, with a line


class Observed(NamedTuple):
    """One observable on E: its value, its derivative along v given U, its changes over the sweep."""

    name: str
    unit: str
    normalised_by: str
    weights: str  # per_decision or sequence
    baseline: str
    responses: int  # that it applies to
    unit_n: Tensor  # their sampling units
    value: float
    value_error: Error
    derivative: FirstOrder
    measured: tuple[Measured, ...]  # at the plan's etas
    rounding: float | None  # sd of a measured change; None: not known


def asked_for(plan: Plan) -> Asked:
    """What measure.observables names, functions loaded; InputError for one that cannot be had."""
    names = plan.config.measure.observables
    if names is None:
        return Asked((*(["reward"] if _scored_by_default(plan) else []), "length"), {}, True)
    if {"kl_base", "kl_base_sampled"} & set(names) and not isinstance(plan.policy.model, PeftModel):
        raise InputError(
            "measure.observables has kl_base, the divergence from the policy without its adapter, but "
            "the whole model was trained: remove it"
        )
    of_reward = {"reward", "correct"} & set(names)
    if of_reward and plan.reward is None and getattr(plan.supplied_eval, "reward", None) is None:
        configured_reward(plan.config)
    own = plan.config.reward.conversational
    functions = {name: load_observable(name, conversational=own) for name in names if ":" in name}
    return Asked(names, functions, False)


def _scored_by_default(plan: Plan) -> bool:
    """Whether E has rewards, or is sampled and has a function that is known to be U's or one's own."""
    if plan.supplied_eval is not None:
        return plan.supplied_eval.reward is not None
    return plan.reward is not None or plan.config.reward.function not in BUILT_IN


def functions_of_E(
    predicted: Predicted, asked: Asked, narrator: Narrator
) -> dict[str, Float64[Tensor, " N"]]:
    """The value of every response of E, by name; NaN where a function does not apply.

    The user's code runs here, once and before the passes of the sweep. InputError as `rewards_of_E` and
    the functions raise it, and for one that applies to fewer than two sampling units; of a reward that
    is observed by default a line instead.
    """
    plan, batches = predicted.plan, predicted.batches
    rollouts, found = batches.eval_rollouts, dict[str, Tensor]()
    if {"reward", "correct"} & set(asked.names):
        try:
            reward_N = _at_two(predicted, "reward", rewards_of_E(plan, batches, narrator))
        except InputError as error:
            if not asked.default:
                raise
            narrator.say(f"the reward of E is not observed: {error}")
        else:
            right_N = (reward_N >= plan.config.reward.correct_at).double()
            found = {"reward": reward_N, "correct": right_N.masked_fill(reward_N.isnan(), math.nan)}
    ended = [float(ids[-1] in plan.policy.eos_ids) for ids in rollouts.response_ids]
    found |= {
        "length": batches.eval_batch.response_length_N.double(),
        "stop": torch.tensor(ended, dtype=torch.float64),
    }
    for name, function in asked.functions.items():
        what, remedy = f"E is supplied, and the observable {name!r}", f"leave out {name}"
        with narrator.phase(f"observable {observable_label(name)}"):
            found[name] = _at_two(predicted, name, values_on_E(plan, rollouts, function, what, remedy))
    return {name: found[name] for name in asked.names if name in found}


def observe(
    predicted: Predicted,
    asked: Asked,
    f: dict[str, Float64[Tensor, " N"]],
    sweep: Sweep,
    stages: Stages,
    narrator: Narrator,
) -> tuple[Observed, ...]:
    """Every observable that is asked for: by arithmetic, and of KL to the base by a pass of its own."""
    found = []
    for name in asked.names:
        if name in f:
            found.append(_of_response(predicted, name, f[name], sweep))
        elif name == "kl_base":
            found.append(_of_kl(predicted, sweep, stages, narrator))
        elif name == "kl_base_sampled":
            found.append(_of_sampled_kl(predicted, sweep, stages, narrator))
    return tuple(found)


def _at_two(predicted: Predicted, name: str, f_N: Tensor) -> Tensor:
    applies_N = ~f_N.isnan()
    if len(predicted.unit_N[applies_N].unique()) < 2:
        raise InputError(
            f"{name!r} applies to {int(applies_N.sum())} responses of E: two independent ones are "
            "needed for an interval; leave it out, or use prompts to which it applies"
        )
    return f_N


def _of_response(predicted: Predicted, name: str, f_N: Float64[Tensor, " N"], sweep: Sweep) -> Observed:
    plan, batches, prediction = predicted.plan, predicted.batches, predicted.prediction
    row_n = (~f_N.isnan()).nonzero()[:, 0]
    part, whole = select(batches.eval_batch, row_n), len(row_n) == len(f_N)
    width, logp_NR = int(part.response_length_N.max()), batches.sampler_logp_NR

    def of_part(stats: TokenStats) -> TokenStats:
        return TokenStats(*(x_NR[row_n, :width] for x_NR in stats))

    first = float(f_N[row_n[0]])  # taken off: a constant has no change, even by rounding
    at = of_response(
        part,
        of_part(prediction.stats),
        f_N[row_n] - first,
        None if logp_NR is None else logp_NR[row_n, :width],
        plan.entropy.clip,
        baseline_of(plan.entropy) if whole else "none",
    )
    f_nR = at.stats.entropy_NR
    found = _observed(
        name,
        (
            UNITS.get(name, observable_label(name)),
            f"mean over E{'' if whole else ', where it applies'}",
        ),
        at,
        TokenStats(of_part(prediction.tangent).logp_NR, torch.zeros_like(f_nR)),
        [TokenStats(of_part(_moved(point)).logp_NR, f_nR) for point in sweep.points],
        _at_tiny_etas(sweep, lambda moved: TokenStats(of_part(moved).logp_NR, f_nR), row_n),
        predicted.unit_N[row_n],
    )
    return found._replace(value=found.value + first)


def _of_kl(predicted: Predicted, sweep: Sweep, stages: Stages, narrator: Narrator) -> Observed:
    plan, prediction = predicted.plan, predicted.prediction
    E, v = predicted.batches.eval_batch, prediction.direction.total
    kl = kl_of(plan, predicted.batches, v, stages, narrator)
    entropy = plan.entropy._replace(baseline=baseline_of(plan.entropy))
    return _observed(
        "kl_base",
        _per(entropy),
        of_tokens(E, prediction.stats, kl.kl_NR, entropy, predicted.batches.sampler_logp_NR),
        TokenStats(prediction.tangent.logp_NR, kl.tangent_NR),
        [
            TokenStats(_moved(point).logp_NR, moved_NR)
            for point, moved_NR in zip(sweep.points, kl.moved, strict=True)
        ],
        None,
        predicted.unit_N,
    )


def _of_sampled_kl(predicted: Predicted, sweep: Sweep, stages: Stages, narrator: Narrator) -> Observed:
    plan, prediction, E = predicted.plan, predicted.prediction, predicted.batches.eval_batch
    base = base_params(plan.policy.model, plan.policy.params)
    inputs = {**state_inputs(plan, predicted.batches), "base": base}

    def compute(stage: Stage) -> TokenStats:
        return funcprobe.token_stats(base, E, counted(plan.forward, stage, "E"), plan.max_tokens)

    with narrator.phase("base policy on E", len(E.prompt_N)) as stage:
        found = computed(stages, "base", inputs, like_stats(E), compute, stage)

    def divergence(stats: TokenStats) -> TokenStats:
        return TokenStats(stats.logp_NR, stats.logp_NR - found.logp_NR)

    entropy = plan.entropy._replace(baseline=baseline_of(plan.entropy))
    here, sampler_NR = divergence(prediction.stats), predicted.batches.sampler_logp_NR
    slope_NR = prediction.tangent.logp_NR
    return _observed(
        "kl_base_sampled",
        _per(entropy),
        of_sampled_tokens(E, prediction.stats, here.entropy_NR, entropy, sampler_NR),
        TokenStats(slope_NR, slope_NR),
        [divergence(_moved(point)) for point in sweep.points],
        _at_tiny_etas(sweep, divergence, torch.arange(len(E.prompt_N))),
        predicted.unit_N,
    )


def _observed(
    name: str,
    unit: tuple[str, str],
    at: Evaluation,
    tangent: TokenStats,
    moved: Sequence[TokenStats],
    tiny: Tiny | None,
    unit_n: Tensor,
) -> Observed:
    influence_n = entropy_influence(at.stats, at.mask_NR, at.entropy, at.log_ratio_NR)
    return Observed(
        name=name,
        unit=unit[0],
        normalised_by=unit[1],
        weights=at.entropy.weights,
        baseline=at.entropy.baseline,
        responses=len(unit_n),
        unit_n=unit_n,
        value=evaluation.value(at),
        value_error=delta_error(influence_n, unit_n),
        derivative=evaluation.derivative(at, tangent, unit_n),
        measured=tuple(evaluation.change(at, stats) for stats in moved),
        rounding=None if tiny is None else noise_of(at, tiny),
    )


def _at_tiny_etas(sweep: Sweep, of: Callable[[TokenStats], TokenStats], row_n: Tensor) -> Tiny | None:
    """The observable's statistics of the sequences `row_n` at tiny etas; None: none was moved."""
    if sweep.tiny is None:
        return None
    few_n = torch.isin(row_n, sweep.tiny.few_n).nonzero()[:, 0]  # in row_n
    return Tiny(few_n, tuple(of(moved) for moved in sweep.tiny.moved)) if len(few_n) else None


def _per(entropy: Entropy) -> tuple[str, str]:
    return f"nats per {entropy.per}", f"per {entropy.per}, over E"


def baseline_of(entropy: Entropy) -> Baseline:
    """Of an observable: the entropy's own; none where that is the entropy itself."""
    return "none" if entropy.baseline == "entropy" else entropy.baseline


def _moved(point: Point) -> TokenStats:
    assert point.moved is not None  # kept by the sweep of a run
    return point.moved
