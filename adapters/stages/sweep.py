"""Measured changes: at the learning rates of the sweep, at tiny ones for rounding, and for H''."""

from typing import Any, NamedTuple

import torch

import funcprobe
from funcprobe import tree
from funcprobe.policy.forward import Forward
from funcprobe.policy.layout import select
from funcprobe.statistics.estimators import Measured
from funcprobe.statistics.evaluation import Evaluation
from funcprobe.statistics.intervals import Error, delta_error
from funcprobe.statistics.second_order import difference_eta, rounding_noise, second_difference
from funcprobe.types import Params, TokenStats

from .. import store
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..sampling.drawing import derived_seed
from ..store import Stages
from .batches import Batches
from .fresh import Fresh, sample_again
from .like import like_stats
from .plan import Plan
from .weight_diagnostics import WeightDiagnostics, verdict

FEW = 64  # sequences of E that the rounding noise is measured on


class Point(NamedTuple):
    """The change at one learning rate, with the diagnostics of its importance weights."""

    eta: float
    measured: Measured
    diagnostics: WeightDiagnostics
    fresh: Fresh | None
    moved: TokenStats | None = None  # E's statistics at theta + eta v


class Curvature(NamedTuple):
    """The second derivative of the estimator along v, per unit of eta squared."""

    second: float
    error: Error
    eta: float | None  # of the symmetric difference; None: exact, in Taylor mode


class Tiny(NamedTuple):
    """E's statistics at tiny etas, half and whole, up, then down: of few sequences, others unmoved."""

    few_n: torch.Tensor  # indices in E
    moved: tuple[TokenStats, ...]


class Sweep(NamedTuple):
    """Measured changes at ascending learning rates, their rounding noise, the second derivative."""

    points: tuple[Point, ...]
    rounding_noise: float | None  # sd of one measured change; None if v changes no log-probability
    curvature: Curvature | None
    tiny: Tiny | None = None


def measure_sweep(
    plan: Plan,
    batches: Batches,
    prediction: funcprobe.Prediction,
    unit_N: torch.Tensor,
    stages: Stages,
    narrator: Narrator,
) -> Sweep:
    """Every eta of the plan, the rounding noise and the second derivative; E's statistics are stored.

    If the verdict is "resample" and `measure.resample` is set, responses are sampled at theta + eta v
    as well. `unit_N` is the index of the sampling unit of every sequence of E.
    """
    v, at = prediction.direction.total, prediction.at
    tiny, mode = None, _second_order(plan, narrator)
    slight, pair = _rounding_eta(prediction, plan.forward), []
    if mode == "difference" and slight:
        wide = difference_eta(prediction.tangent, at.mask_NR, plan.forward.coarsest)
        pair = [wide, -wide]
    etas, count = [*plan.etas, *pair], len(batches.eval_batch.prompt_N)
    with narrator.phase("measure", len(etas) * count + 4 * min(FEW, count)) as stage:
        moved = {eta: statistics_at(plan, batches, v, eta, stages, stage) for eta in etas}
        if slight:
            tiny = _at_tiny_etas(plan, batches, prediction, slight, stages, stage)
    found = {eta: funcprobe.change(at, stats) for eta, stats in moved.items()}
    noise, curvature = None if tiny is None else noise_of(at, tiny), None
    if pair:
        curvature = by_difference(found[pair[0]], found[pair[1]], pair[0], unit_N)
    if mode == "exact":
        curvature = _exact(plan, batches, v, at, unit_N, stages, narrator)
    points = []
    for eta in plan.etas:
        store.require_finite({"eta": eta, "measured": found[eta].delta}, "sweep")
        judged, fresh = verdict(found[eta].weight_N, found[eta].clipped), None
        if judged.verdict == "resample" and plan.config.measure.resample:
            fresh = sample_again(plan, batches, at, v, eta, unit_N, stages, narrator)
        points.append(Point(eta, found[eta], judged, fresh, moved[eta]))
    return Sweep(tuple(points), noise, curvature, tiny)


def noise_of(at: Evaluation, tiny: Tiny) -> float:
    """The rounding noise of one measured change of all sequences, from those at tiny etas."""
    found = [funcprobe.change(at, stats).influence_N[tiny.few_n] for stats in tiny.moved]
    return rounding_noise((found[0], found[1]), (found[2], found[3]), len(at.mask_NR))


def statistics_at(
    plan: Plan, batches: Batches, v: Params, eta: float, stages: Stages, stage: Stage
) -> TokenStats:
    """E's statistics at theta + eta v: one forward, or stored."""

    def compute(stage: Stage) -> TokenStats:
        moved, forward = tree.axpy(eta, v, plan.policy.params), counted(plan.forward, stage, "E")
        return funcprobe.token_stats(moved, batches.eval_batch, forward, plan.max_tokens)

    inputs = moved_inputs(plan, batches, v, eta)
    return computed(stages, "moved", inputs, like_stats(batches.eval_batch), compute, stage)


def moved_inputs(plan: Plan, batches: Batches, v: Params, eta: float) -> dict[str, Any]:
    """The inputs of `statistics_at`, for the keys of stages."""
    return {**state_inputs(plan, batches), "direction": v, "eta": eta}


def state_inputs(plan: Plan, batches: Batches) -> dict[str, Any]:
    """The inputs of E's statistics, for the keys of stages."""
    return {
        "policy": plan.inputs["policy"],
        **plan.cut,
        "eval": batches.eval_batch,
        "temperature": plan.temperature,
        "sampler_logp": batches.sampler_logp_NR,
    }


def _at_tiny_etas(
    plan: Plan,
    batches: Batches,
    prediction: funcprobe.Prediction,
    eta: float,
    stages: Stages,
    stage: Stage,
) -> Tiny:
    """Four forwards over FEW sequences of E, drawn at random, as a log's first are to few prompts."""
    v, count = prediction.direction.total, len(batches.eval_batch.prompt_N)
    seed = derived_seed(plan.config.run.seed, "rounding")
    drawn_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    few_n = drawn_N[:FEW].sort().values
    part = select(batches.eval_batch, few_n)
    etas = [sign * size for sign in (1, -1) for size in (eta / 2, eta)]

    def compute(stage: Stage) -> tuple[TokenStats, ...]:
        forward = counted(plan.forward, stage, "E")
        there = (tree.axpy(eta, v, plan.policy.params) for eta in etas)
        return tuple(funcprobe.token_stats(at, part, forward, plan.max_tokens) for at in there)

    inputs = {**state_inputs(plan, batches), "direction": v, "etas": etas, "few": few_n}
    found = computed(stages, "rounding", inputs, (like_stats(part),) * len(etas), compute, stage)
    return Tiny(few_n, tuple(_with_rows(prediction.stats, few_n, stats) for stats in found))


def _with_rows(whole: TokenStats, row_n: torch.Tensor, part: TokenStats) -> TokenStats:
    """`whole` with the statistics of the sequences `row_n` replaced."""

    def one(whole_NR: torch.Tensor, part_nR: torch.Tensor) -> torch.Tensor:
        wide_nR = torch.nn.functional.pad(part_nR, (0, whole_NR.shape[1] - part_nR.shape[1]))
        return whole_NR.index_copy(0, row_n, wide_nR)

    return TokenStats(*(one(*pair) for pair in zip(whole, part, strict=True)))


def _rounding_eta(prediction: funcprobe.Prediction, forward: Forward) -> float | None:
    """The eta at which log-probabilities change by a thousand units in the last place (rms), or 1 %.

    Rounding errors are independent there, and nonlinearity is far smaller. None if v changes no
    log-probability.
    """
    slope_NR = prediction.tangent.logp_NR
    rms = float(slope_NR[slope_NR != 0].square().mean().sqrt()) if bool(slope_NR.any()) else 0.0
    return min(1e3 * torch.finfo(forward.coarsest).eps, 1e-2) / rms if rms else None


def _second_order(plan: Plan, narrator: Narrator) -> str:
    chosen = plan.config.measure.second_order
    if chosen != "none" and torch.finfo(plan.forward.coarsest).bits < 32:
        precision = f"{plan.forward.coarsest} (policy.dtype, policy.precision)"
        narrator.say(f"warning: second order is omitted: in {precision} it is dominated by rounding")
        return "none"
    return chosen


def by_difference(plus: Measured, minus: Measured, eta: float, unit_N: torch.Tensor) -> Curvature:
    """H'' and its influence values are the same linear function of the two changes."""
    influence_N = (plus.influence_N + minus.influence_N) / eta**2
    second = second_difference(plus.delta, minus.delta, eta)
    return Curvature(second, delta_error(influence_N, unit_N), eta)


def _exact(
    plan: Plan,
    batches: Batches,
    direction: funcprobe.Params,
    at: Evaluation,
    unit_N: torch.Tensor,
    stages: Stages,
    narrator: Narrator,
) -> Curvature:
    params, E = plan.policy.params, batches.eval_batch
    inputs = {**state_inputs(plan, batches), "direction": direction}

    def compute(stage: Stage) -> tuple[TokenStats, TokenStats, TokenStats]:
        forward = counted(plan.forward, stage, "E")
        return funcprobe.second_tangents(params, E, direction, forward, plan.max_tokens)

    with narrator.phase("second order", len(E.prompt_N)) as stage:
        like = (like_stats(E),) * 3
        _, tangent, second = computed(stages, "second-order", inputs, like, compute, stage)
    found = funcprobe.second_derivative(at, tangent, second, unit_N)
    return Curvature(found.derivative, delta_error(found.influence_N, unit_N), None)
