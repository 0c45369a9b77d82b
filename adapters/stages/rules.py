"""The step under other rules, on a run's E and U: what each does to the entropy and to a reward."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import funcprobe
from funcprobe import tree
from funcprobe.along import require_step
from funcprobe.policy.dropout import masked_forwards
from funcprobe.policy.layout import select
from funcprobe.rules.named import BoundRule
from funcprobe.rules.rule import RuleInputs, touched
from funcprobe.statistics import evaluation, observables
from funcprobe.statistics.estimators import Measured
from funcprobe.statistics.evaluation import Evaluation
from funcprobe.statistics.second_order import difference_eta
from funcprobe.step import masked
from funcprobe.step.adam import UpdateDirection
from funcprobe.types import InputError, Params, TokenStats, UpdateBatch

from ..console import Narrator
from ..machine.cost import Stage, counted
from ..machine.precision import of_machine
from ..resume import computed
from ..store import Stages
from .first_order import Predicted
from .fit import CURVED
from .gradient import gradients_on_U
from .like import like_gradient, like_stats
from .observables import baseline_of
from .plan import Plan
from .sweep import by_difference, moved_inputs, state_inputs, statistics_at
from .weight_diagnostics import WeightDiagnostics, verdict


class Rewarded(NamedTuple):
    """E[reward] over the responses of E that have a reward."""

    at: Evaluation  # of those responses
    row_n: Tensor  # their rows of E
    unit_n: Tensor
    X: Params  # gradient of the estimator


class Given(NamedTuple):
    """What every rule starts from."""

    found: Predicted
    inputs: RuleInputs
    why: dict[str, str]  # why an input of rules is not there
    rewarded: Rewarded | None
    eta: float


class Change(NamedTuple):
    """Of one observable at theta + eta v."""

    predicted: float  # eta <X, v>
    measured: Measured


class Outcome(NamedTuple):
    """What the step does under a rule."""

    name: str  # of the rule, with its argument
    update: UpdateBatch
    touched: float  # share of the tokens of J
    clip_coefficient: float
    entropy: Change
    reward: Change | None
    diagnostics: WeightDiagnostics


def rewarded(
    found: Predicted, reward_N: Float[Tensor, " N"], stages: Stages, narrator: Narrator
) -> Rewarded:
    """E[reward] at theta, and its gradient by one pass over E; NaN: the reward does not apply.

    With the baseline that the observable "reward" of a run has.

    InputError for fewer than two sampling units with a reward.
    """
    plan, batches = found.plan, found.batches
    row_n = (~reward_N.isnan()).nonzero()[:, 0]
    unit_n = found.unit_N[row_n]
    if len(unit_n.unique()) < 2:
        raise InputError(
            f"{len(row_n)} responses of E have a reward: at least two independent ones are expected"
        )
    part, logp_NR = select(batches.eval_batch, row_n), batches.sampler_logp_NR
    at = observables.of_response(
        part,
        _rows(found.prediction.stats, row_n, int(part.response_length_N.max())),
        reward_N[row_n],
        None if logp_NR is None else logp_NR[row_n, : int(part.response_length_N.max())],
        plan.entropy.clip,
        baseline_of(plan.entropy) if len(row_n) == len(reward_N) else "none",
    )
    p_nR, q_nR = evaluation.gradient_coefficients(at)
    inputs = {**state_inputs(plan, batches), "p": p_nR, "rows": row_n}
    zeros = torch.zeros_like(q_nR)  # a reward is no function of the parameters

    def compute(stage: Stage) -> Params:
        forward = counted(plan.forward, stage, "E")
        given = (part, p_nR, zeros, forward, plan.max_tokens)
        return funcprobe.weighted_grad(plan.policy.params, *given)

    with narrator.phase("gradient of the reward", len(row_n)) as stage:
        like = like_gradient(plan.policy.params)
        X = computed(stages, "reward-gradient", inputs, like, compute, stage)
    return Rewarded(at, row_n, unit_n, X)


def applied(given: Given, asked: BoundRule) -> UpdateBatch:
    """U with the rule's coefficients. InputError as the rule raises it, and if they are not finite."""
    if lacking := [given.why[name] for name in asked.needs if name in given.why]:
        raise InputError(f"rule {asked.text}: {lacking[0]}")
    unknown = given.why.get("unit_NR")
    try:
        update = asked.apply(given.inputs)
    except InputError as error:
        raise InputError(f"rule {asked.text}: {unknown or error}") from error
    d_NR = update.entropy_coef_NR
    if bool(update.coef_NR.isfinite().all()) and (d_NR is None or bool(d_NR.isfinite().all())):
        return update
    why = unknown or "check its argument and the columns of U"
    raise InputError(f"rule {asked.text} gives coefficients that are not finite: {why}")


def own(given: Given, stages: Stages, narrator: Narrator) -> Outcome:
    """The run's own rule, whose gradient the prediction has."""
    prediction, update = given.found.prediction, given.found.batches.update
    return along(given, "own", update, prediction.direction, 0.0, stages, narrator)


def outcome(given: Given, asked: BoundRule, stages: Stages, narrator: Narrator) -> Outcome:
    """What the step does under a rule: a gradient pass over U (one for each dropout mask), a forward
    over E. InputError as `applied`, and where nothing is left of the step.
    """
    plan, batches = given.found.plan, given.found.batches
    update, share = applied(given, asked), 1.0
    if asked.temperature is None or asked.temperature == plan.temperature:
        share = touched(update, batches.update, given.inputs.mask_NR)
    Y = gradients_on_U(
        _at_temperature(plan, asked.temperature),
        batches._replace(update=update),
        stages,
        narrator,
    )
    v = masked.mean_direction(plan.policy.params, Y, plan.adam_state, plan.step)
    if not update.moves:
        require_step(v, plan.step)
    return along(given, asked.text, update, v, share, stages, narrator)


def along(
    given: Given,
    name: str,
    update: UpdateBatch,
    v: UpdateDirection,
    share: float,
    stages: Stages,
    narrator: Narrator,
) -> Outcome:
    """The outcome of a step in direction v, by one forward over E at theta + eta v."""
    found, eta, of_reward = given.found, given.eta, given.rewarded
    with narrator.phase("measure", len(found.batches.eval_batch.prompt_N)) as stage:
        moved = statistics_at(found.plan, found.batches, v.total, eta, stages, stage)
    prediction, reward = found.prediction, None
    measured = funcprobe.change(prediction.at, moved)
    if of_reward is not None:
        width = of_reward.at.mask_NR.shape[1]
        reward = Change(
            eta * tree.dot(of_reward.X, v.total),
            observables.response_change(of_reward.at, _rows(moved, of_reward.row_n, width)),
        )
    return Outcome(
        name,
        update,
        share,
        v.clip_coefficient,
        Change(eta * tree.dot(prediction.X, v.total), measured),
        reward,
        verdict(measured.weight_N, measured.clipped),
    )


def linear_until(found: Predicted, stages: Stages) -> float | None:
    """The eta at which the quadratic term of the run's own step is CURVED of the linear one.

    From the symmetric difference of a run's sweep, where that is stored; None: not known.
    """
    plan, batches, prediction = found.plan, found.batches, found.prediction
    v = prediction.direction.total
    if not bool(prediction.tangent.logp_NR.any()):
        return None
    wide = difference_eta(prediction.tangent, prediction.at.mask_NR, plan.forward.coarsest)
    changes = []
    for eta in (wide, -wide):
        inputs = moved_inputs(plan, batches, v, eta)
        like = like_stats(batches.eval_batch)
        stored: TokenStats | None = stages.stored("moved", inputs, like)
        if stored is None:
            return None
        changes.append(funcprobe.change(prediction.at, stored))
    curvature = by_difference(changes[0], changes[1], wide, found.unit_N)
    star = funcprobe.eta_star(prediction.derivative, curvature.second)
    return None if math.isinf(star) else CURVED * star


def _rows(stats: TokenStats, row_n: Tensor, width: int) -> TokenStats:
    return TokenStats(*(x_NR[row_n, :width] for x_NR in stats))


def _at_temperature(plan: Plan, temperature: float | None) -> Plan:
    """The plan with the forward, and its dropout masks, at another temperature."""
    if temperature is None or temperature == plan.temperature:
        return plan
    model, params, masks = plan.policy.model, plan.policy.params, plan.masks
    forward = funcprobe.frozen_forward(model, params, temperature)
    own = plan.forward
    forward = of_machine(forward, plan.config.policy.precision)._replace(
        halved=own.halved, ranks=own.ranks, recompute=own.recompute, recomputing=own.recomputing
    )
    if masks:
        masks = masked_forwards(model, params, forward, len(masks), plan.config.run.seed)
    return plan._replace(forward=forward, masks=masks, temperature=temperature)
