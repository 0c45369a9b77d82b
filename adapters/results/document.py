"""A run's batches, prediction and sweep -> results.json."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

import funcprobe
from funcprobe import tree
from funcprobe.checks import Check
from funcprobe.statistics.estimators import entropy_influence
from funcprobe.statistics.intervals import Error, delta_error
from funcprobe.statistics.intervals import total as combined
from funcprobe.types import InputError

from .. import store
from ..machine.cost import Cost
from ..stages.batches import Batches
from ..stages.observables import Observed
from ..stages.plan import Plan
from ..stages.sweep import Sweep
from .attribution_sections import AttributionSection
from .cost import cost_section
from .momentum_sections import MomentumSection
from .observables import observables
from .quantity import Quantity, quantity, student_interval
from .schema import SCHEMA_VERSION, Results
from .sections import (
    CheckResult,
    Conventions,
    Counts,
    EntropySettings,
    FirstOrder,
    LossSection,
    Masks,
    Norms,
    ObjectiveSettings,
    SecondMoments,
    StateEvidence,
    StepSettings,
)
from .sweep import Errors, errors_of, fits, second_order, sweep_rows
from .verdict import verdict_of


def document(
    plan: Plan,
    batches: Batches,
    prediction: funcprobe.Prediction,
    evidence: funcprobe.Evidence | None,
    unit_N: torch.Tensor,
    sweep: Sweep,
    checks: list[Check],
    costs: dict[str, Cost],
    observed: Iterable[Observed] = (),
    attribution: AttributionSection | None = None,
    momentum: MomentumSection | None = None,
) -> Results:
    """The content of results.json. Of two runs of one seed on one machine, only "cost" differs.

    Raises InputError for a number that is not finite, with its place, and for a predicted change of 0,
    relative to which nothing can be stated.
    """
    _require_change(prediction, sweep)
    unit = entropy_unit(plan)
    errors = errors_of(prediction, unit_N, known_step=plan.known_step)
    results = Results(
        schema_version=SCHEMA_VERSION,
        conventions=conventions(plan),
        counts=counts(plan, batches),
        entropy=quantity(prediction.entropy, unit, f"per {plan.entropy.per}, over E"),
        entropy_interval=student_interval(prediction.entropy, entropy_error(prediction, unit_N)),
        unlike_the_run=plan.unlike_the_run,
        loss=_loss(plan, batches, prediction),
        mean_reward=_mean_reward(batches.update_rollouts.reward),
        first_order=_first_order(plan, prediction, errors),
        attribution=attribution,
        momentum=momentum,
        second_order=second_order(prediction, sweep, unit),
        norms=_norms(prediction, unit),
        clip_coefficient=prediction.direction.clip_coefficient,
        second_moments=_second_moments(plan, prediction),
        state_evidence=_state_evidence(evidence),
        next_lr=quantity(
            plan.next_lr, "learning rate", "of the next step, by the optimizer state or optimizer.lr"
        ),
        sweep=sweep_rows(prediction, unit_N, sweep, errors, unit, plan.next_lr),
        observables=observables(observed, sweep, plan.next_lr),
        fit=fits(prediction, sweep, unit),
        checks=tuple(CheckResult(**check._asdict()) for check in checks),
        cost=cost_section(costs.values(), sizes(batches)),
    )
    results = results.model_copy(update={"verdict": verdict_of(results)})
    store.require_finite(results.model_dump(mode="json"), "results.json")
    return results


def entropy_unit(plan: Plan) -> str:
    """nats per token or nats per sequence."""
    return f"nats per {plan.entropy.per}"


def _require_change(prediction: funcprobe.Prediction, sweep: Sweep) -> None:
    if not prediction.derivative:
        raise InputError(
            "the derivative of the entropy along v is 0, so there is no change to compare with: check "
            "that the learning rates are not 0 and that v changes a log-probability of E"
        )
    for point in sweep.points:
        if not point.eta * prediction.derivative:
            raise InputError(
                f"the change predicted at eta = {point.eta:g} is 0, with derivative "
                f"{prediction.derivative:g}: remove this eta from measure.etas"
            )


def conventions(plan: Plan) -> Conventions:
    """Signs, normalisation and settings of every number."""
    divisor = {} if plan.loss is None else {"normalisation": "of the loss"}
    return Conventions(
        sign="positive: the step raises the entropy; v is theta_next - theta per unit of lr",
        entropy=EntropySettings(**plan.entropy._asdict()),
        step=StepSettings(**plan.step._asdict()),
        objective=ObjectiveSettings(**plan.objective._asdict() | divisor),
        temperature=plan.temperature,
        dtype=plan.config.policy.dtype,
        precision=plan.config.policy.precision or "as dtype",
        max_tokens=plan.max_tokens,
        se="one standard error; sampling units are the draws of E (its prompts, where E is supplied) "
        "and the prompts of U",
        interval="95 %, Student's t; degrees of freedom by Welch-Satterthwaite for the total",
        names="X: gradient of the entropy estimator on E; Y: gradient of the objective on U; "
        "P: diagonal through which Y enters v; <., .>: sum over all parameters",
    )


def _mean_reward(rewards: list[float] | None) -> Quantity | None:
    """None where no response has a reward, as in a supplied U with advantages alone."""
    known = [reward for reward in rewards or [] if not math.isnan(reward)]
    if not known:
        return None
    return quantity(float(np.mean(known)), "reward", "mean over the responses of U with a reward")


def _loss(plan: Plan, batches: Batches, prediction: funcprobe.Prediction) -> LossSection:
    """Of a preset -J, where every ratio is 1, and the entropy over tokens if U was passed."""
    chosen, report = plan.loss, batches.loss
    about = "loss of the optimizer step, at theta"
    if chosen is not None and report is not None:
        value = quantity(report.loss, "loss", about)
        return LossSection(
            name=chosen.name,
            settings={key: _finite(value) for key, value in chosen.settings.items()},
            at_theta=value,
            reference=batches.reference,
            metrics={name: x if math.isfinite(x) else None for name, x in report.metrics.items()},
            divisor_residual=report.divisor_residual,
        )
    update = batches.update
    entropy_NR, tokens = prediction.update_stats.entropy_NR, update.batch.response_length_N.sum()
    metrics = {"entropy": float(entropy_NR.sum() / tokens)} if update.moves else {}
    value = quantity(-float(update.coef_NR.sum()), "loss", about)
    return LossSection(
        name="preset",
        settings={},
        at_theta=value,
        reference=None,
        metrics=metrics,
        divisor_residual=0.0,
    )


def _finite(value: Any) -> Any:
    """A setting as JSON has it: infinity, of a bound that is none, as its text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def entropy_error(prediction: funcprobe.Prediction, unit_N: torch.Tensor) -> Error:
    """Of H(theta) on E, over E's sampling units."""
    at = prediction.at
    influence_N = entropy_influence(at.stats, at.mask_NR, at.entropy, at.log_ratio_NR)
    return delta_error(influence_N, unit_N)


def _norms(prediction: funcprobe.Prediction, unit: str) -> Norms:
    def norm(value: funcprobe.Params, unit: str) -> Quantity:
        return quantity(tree.norm(value), unit, "Euclidean norm over all tensors")

    return Norms(
        X=norm(prediction.X, f"{unit} per unit of parameter"),
        Y=norm(prediction.Y, "objective per unit of parameter"),
        v=norm(prediction.direction.total, "per unit of learning rate"),
    )


def sizes(batches: Batches) -> dict[str, int]:
    """Sequences of each batch; those resampled at theta + eta v are as many as E's."""
    count = len(batches.eval_batch.prompt_N)
    return {"E": count, "fresh": count, "U": len(batches.update.batch.prompt_N)}


def counts(plan: Plan, batches: Batches) -> Counts:
    """Sizes of E, U and the adapter."""
    update_batch = batches.update.batch
    return Counts(
        E_sequences=len(batches.eval_batch.prompt_N),
        E_prompts=len(batches.eval_batch.prompt_N.unique()),
        E_tokens=int(batches.eval_batch.response_length_N.sum()),
        U_sequences=len(update_batch.prompt_N),
        U_prompts=len(update_batch.prompt_N.unique()),
        U_tokens=int(update_batch.response_length_N.sum()),
        U_groups_without_gradient=batches.equal_groups,
        trainable_parameters=sum(t.numel() for t in plan.policy.params.values()),
    )


def _first_order(plan: Plan, prediction: funcprobe.Prediction, errors: Errors) -> FirstOrder:
    rate = f"{entropy_unit(plan)} per unit of learning rate"
    over, first = f"per {plan.entropy.per}, over E", prediction.first_order
    over_U = "prompts of U, second moment held fixed"
    if not bool(prediction.t_N.any()):
        over_U += "; 0, as no group of this U has a gradient: unknown for another U"
    return FirstOrder(
        derivative=quantity(prediction.derivative, rate, over),
        bars_dot=quantity(prediction.bars_dot, rate, f"{over}, <X, v>"),
        bars_dot_identity=quantity(prediction.bars_dot_identity, rate, f"{over}, <X, Y>"),
        from_update=quantity(prediction.from_update, rate, f"{over}, <X, P Y>"),
        from_momentum=quantity(prediction.from_momentum, rate, f"{over}, <X, v_momentum>"),
        from_weight_decay=quantity(prediction.from_decay, rate, f"{over}, <X, v_decay>"),
        se_given_U=quantity(first.se, rate, "sampling units of E, delta method"),
        se_given_U_jackknife=quantity(first.se_jackknife, rate, "sampling units of E, delete-one"),
        se_over_U=quantity(
            errors.over_U.se,
            rate,
            "0: U is the batch of the next step itself" if plan.known_step else over_U,
        ),
        se_total=quantity(errors.total.se, rate, "root of the sum of squares"),
        interval_given_U=student_interval(prediction.derivative, errors.given_U),
        interval_over_U=student_interval(prediction.derivative, errors.over_U),
        interval_total=student_interval(prediction.derivative, errors.total),
        interval_next_U=student_interval(prediction.derivative, errors.next_U),
        masks=_masks(prediction, errors, rate),
    )


def _masks(prediction: funcprobe.Prediction, errors: Errors, rate: str) -> Masks | None:
    if prediction.masks is None or errors.masks is None:
        return None
    count = len(prediction.masks.derivative)
    return Masks(
        count=count,
        spread=quantity(prediction.masks.spread, rate, f"standard deviation over {count} masks"),
        se_one_step=quantity(errors.masks.se, rate, "one mask about the mean of these"),
        interval_one_step=student_interval(prediction.derivative, errors.masks),
        interval_given_U=student_interval(
            prediction.derivative, combined(errors.given_U, errors.masks)
        ),
    )


def _second_moments(plan: Plan, prediction: funcprobe.Prediction) -> SecondMoments | None:
    if not plan.adam_state.exp_avg_sq:
        return None
    _, info = funcprobe.preconditioner(plan.policy.params, plan.adam_state)
    scale = funcprobe.gradient_scale(
        prediction.Y, plan.adam_state, prediction.direction.clip_coefficient
    )
    return SecondMoments(
        **info._asdict(),
        zero_outputs=sum(int((v == 0).sum()) for v in prediction.direction.total.values()),
        gradient_ratio=scale.median,
        gradient_beyond_ten=scale.beyond_ten,
        below_eps=scale.below_eps,
    )


def _state_evidence(evidence: funcprobe.Evidence | None) -> StateEvidence | None:
    if evidence is None:
        return None
    nearest = min(evidence.over, key=evidence.over.__getitem__, default=None)
    return StateEvidence(
        verdict=evidence.verdict,
        parameters=evidence.alike,
        at_home=evidence.home,
        log_odds_over_random=evidence.over_random,
        log_odds_over_nearest=evidence.over[nearest] if nearest else None,
        nearest_order=nearest,
        margin=evidence.margin,
    )
