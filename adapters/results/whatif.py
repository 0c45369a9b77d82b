"""The outcomes of rules -> whatif.json."""

from collections.abc import Mapping, Sequence

import torch

from funcprobe.rules.named import BoundRule
from funcprobe.statistics import evaluation
from funcprobe.statistics.estimators import Measured
from funcprobe.statistics.intervals import delta_error

from .. import store
from ..machine.cost import Cost
from ..stages.rules import Change, Given, Outcome
from ..stages.solve import Solved
from .belonging import inputs_of
from .cost import cost_section
from .document import conventions, counts, entropy_error, entropy_unit, sizes
from .quantity import Interval, Quantity, quantity, student_interval
from .whatif_sections import (
    SCHEMA_VERSION,
    ChangeSection,
    Frontier,
    FrontierPoint,
    LeftOut,
    RuleRow,
    Solution,
    WhatIf,
)
from .whatif_words import findings, limits

CHOSEN_ON_E = {"share_NR", "marginal_NR"}
OVER_E = "over E, on the same samples for every rule"


def whatif_document(
    given: Given,
    outcomes: Sequence[Outcome],
    rules: Mapping[str, BoundRule],
    left_out: Mapping[str, str],
    solved: Solved | None,
    linear_until: float | None,
    costs: Mapping[str, Cost],
) -> WhatIf:
    """The content of whatif.json. `outcomes`: the run's own rule first; `rules`: by name.

    Of two calls of one seed on one machine only "cost" differs. Raises InputError for a number that is
    not finite, with its place.
    """
    found, unit = given.found, entropy_unit(given.found.plan)
    own, prediction = outcomes[0], found.prediction
    dominated = _dominated(outcomes)
    bound = rules if solved is None else {**rules, solved.outcome.name: solved.rule}
    rows = tuple(
        _row(one, own, given, bound.get(one.name), unit, one.name not in dominated) for one in outcomes
    )
    rewarded = given.rewarded
    document = WhatIf(
        schema_version=SCHEMA_VERSION,
        conventions=conventions(found.plan),
        counts=counts(found.plan, found.batches),
        inputs=inputs_of(found.plan.config.run.seed, found.plan.inputs),
        unlike_the_run=found.plan.unlike_the_run,
        learning_rate=quantity(given.eta, "learning rate", "of the first parameter group"),
        is_next_lr=given.eta == found.plan.next_lr,
        linear_until=None
        if linear_until is None
        else quantity(
            linear_until, "learning rate", "from the second derivative along the run's own v"
        ),
        entropy=quantity(prediction.entropy, unit, f"per {found.plan.entropy.per}, over E"),
        entropy_interval=student_interval(prediction.entropy, entropy_error(prediction, found.unit_N)),
        reward=None
        if rewarded is None
        else quantity(
            evaluation.value(rewarded.at),
            "reward",
            f"mean over the {len(rewarded.row_n)} responses of E with a reward",
        ),
        rules=rows,
        left_out=tuple(LeftOut(rule=name, reason=why) for name, why in left_out.items()),
        frontier=None if rewarded is None else _frontier(rows, unit, dominated),
        solution=None if solved is None else _solution(solved, rows, unit),
        limits=limits(given, rows),
        findings=findings(given, rows, unit, linear_until),
        cost=cost_section(costs.values(), sizes(found.batches)),
    )
    store.require_finite(document.model_dump(mode="json"), "whatif.json")
    return document


def _about(rule: BoundRule | None) -> str:
    if rule is None:
        return "J as the run has it"
    source = rule.named.source
    return f"{rule.named.about} ({source})" if source else rule.named.about


def _row(
    one: Outcome, own: Outcome, given: Given, rule: BoundRule | None, unit: str, on_frontier: bool
) -> RuleRow:
    found, judged = given.found, one.diagnostics
    holds = judged.verdict != "resample"
    both = holds and own.diagnostics.verdict != "resample"
    total = float(found.batches.update.coef_NR.abs().sum()) or 1.0
    d_NR = one.update.entropy_coef_NR
    reward = None
    if one.reward is not None and own.reward is not None and given.rewarded is not None:
        unit_n = given.rewarded.unit_n
        reward = _change(one.reward, own.reward, unit_n, "reward", holds=holds, both=both)
    relative = "of the run's own sum of |c| over U"
    if not found.batches.update.coef_NR.any():
        relative = "sum over U itself, as the run's own |c| are all 0"
    return RuleRow(
        rule=one.name,
        about=_about(rule),
        chosen_on_E=rule is not None and bool(CHOSEN_ON_E & {*rule.needs}),
        touched=quantity(one.touched, "1", "share of the tokens of J"),
        weight=quantity(float(one.update.coef_NR.abs().sum()) / total, "1", relative),
        entropy_weight=quantity(
            0.0 if d_NR is None else float(d_NR.abs().sum()) / total, "1", relative
        ),
        clip_coefficient=one.clip_coefficient,
        entropy=_change(one.entropy, own.entropy, found.unit_N, unit, holds=holds, both=both),
        reward=reward,
        ess=quantity(judged.ess, "sequences", "importance weights of whole responses"),
        clipped=one.entropy.measured.clipped,
        pareto_k=judged.pareto_k,
        verdict=judged.verdict,
        verdict_reason=judged.reason,
        on_frontier=on_frontier and one.reward is not None and holds,
    )


def _change(
    change: Change, own: Change, unit_N: torch.Tensor, unit: str, *, holds: bool, both: bool
) -> ChangeSection:
    measured, over = change.measured, "sampling units of E"
    error = delta_error(measured.influence_N, unit_N)
    interval = student_interval(measured.delta, error) if holds else None
    difference = measured.delta - own.measured.delta
    paired = delta_error(measured.influence_N - own.measured.influence_N, unit_N)

    def of(value: float, about: str) -> Quantity:
        return quantity(value, unit, about)

    return ChangeSection(
        predicted=of(change.predicted, "over E, to first order"),
        measured=of(measured.delta, OVER_E),
        measured_se_given_U=of(error.se, over),
        measured_interval_given_U=interval,
        missed=of(measured.delta - change.predicted, "measured - predicted"),
        agrees=None if interval is None else interval.low <= change.predicted <= interval.high,
        difference=of(difference, "measured less that of the run's own rule"),
        difference_se=of(paired.se, over),
        difference_interval=student_interval(difference, paired) if both else None,
    )


def _dominated(outcomes: Sequence[Outcome]) -> set[str]:
    """Rules than which another reliable one has more of both, and of one strictly."""
    reliable = [one for one in outcomes if one.reward and one.diagnostics.verdict != "resample"]
    points = {one.name: _point(one.entropy.measured, one.reward) for one in reliable}
    return {
        name
        for name, mine in points.items()
        if any(
            other[0] >= mine[0] and other[1] >= mine[1] and other != mine for other in points.values()
        )
    }


def _point(entropy: Measured, reward: Change | None) -> tuple[float, float]:
    return entropy.delta, reward.measured.delta if reward else 0.0


def _frontier(rows: Sequence[RuleRow], unit: str, dominated: set[str]) -> Frontier:
    points = []
    for row in rows:
        if row.reward is None or row.verdict == "resample":
            continue
        intervals = (row.entropy.measured_interval_given_U, row.reward.measured_interval_given_U)
        halves = [None if one is None else one.half_width for one in intervals]
        points.append(
            FrontierPoint(
                rule=row.rule,
                entropy=row.entropy.measured.value,
                entropy_half_width=halves[0],
                reward=row.reward.measured.value,
                reward_half_width=halves[1],
                dominated=row.rule in dominated,
            )
        )
    return Frontier(
        what="measured changes by one step at this eta; the rules that are not dominated are the "
        "frontier by point estimates, which may differ by less than their errors",
        entropy_unit=unit,
        reward_unit="reward",
        points=tuple(points),
    )


def _solution(solved: Solved, rows: Sequence[RuleRow], unit: str) -> Solution:
    row = next(row for row in rows if row.rule == solved.outcome.name)
    interval = row.entropy.measured_interval_given_U
    method = "Y + b Y_b, with v exact for every b; Brent's method"
    if solved.slope is None:
        method = "bisection, a gradient pass over U each; the nearest of those tried"
    return Solution(
        rule=solved.rule.name,
        target=quantity(solved.target, unit, "predicted change at this eta"),
        coefficient=solved.coefficient,
        coefficient_interval=_of_coefficient(solved, interval),
        row=row.rule,
        method=method,
        reachable=(solved.low, solved.high),
        passes=solved.passes,
        predicted_missed=quantity(row.entropy.predicted.value - solved.target, unit, "less target"),
        measured_missed=quantity(row.entropy.measured.value - solved.target, unit, "less target"),
        within_error=None if interval is None else interval.low <= solved.target <= interval.high,
    )


def _of_coefficient(solved: Solved, interval: Interval | None) -> Interval | None:
    """Where the coefficient may lie, as the change is known to within its interval."""
    if interval is None or not solved.slope:
        return None
    half = interval.half_width / abs(solved.slope)
    return Interval(low=solved.coefficient - half, high=solved.coefficient + half)
