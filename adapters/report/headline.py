"""The first section: what the next step does, how sure that is, what makes it, what to try."""

import json
from typing import NamedTuple

from markupsafe import Markup

from ..config.estimation import observable_label
from ..results.observable_sections import ObservableRow
from ..results.quantity import Interval
from ..results.saved import SavedRun
from ..results.schema import Results
from ..results.verdict import beside_the_change, verdict_of
from ..results.verdict_sections import Effect, Verdict
from ..results.whatif_sections import RuleRow
from ..results.whatif_words import best
from . import numbers
from .causes import again
from .table import Cell, Column, Row, Table
from .trust import passed

KL = ("kl_base", "kl_base_sampled")


class Headline(NamedTuple):
    """What the template of the section shows."""

    statement: Markup
    """In one sentence, what the step does to the entropy."""
    line: str
    """What would tell the sign, and what makes the change; empty: nothing."""
    doubts: tuple[str, ...]
    effects: Table
    kl: str
    """The command that observes the KL to the base policy; empty where it is observed."""
    causes: Table | None
    rule: Markup | None
    """The rule to try; None: none was compared, or none is reliable."""
    about: str
    """What that rule does."""
    passed: str
    all_passed: bool


def headline(run: SavedRun) -> Headline:
    """Of the results, and of the rules where they were compared."""
    results, verdict = run.results, verdict_of(run.results)
    row = best(run.whatif.rules[1:]) if run.whatif else None
    return Headline(
        _statement(verdict),
        beside_the_change(verdict),
        verdict.doubts,
        _effects(results, verdict),
        "" if any(o.name in KL for o in results.observables) else _kl(run),
        _causes(verdict),
        _rule(run.whatif.rules[0], row) if run.whatif and row else None,
        row.about if row else "",
        passed(results),
        all(one.passed for one in results.checks),
    )


def _statement(verdict: Verdict) -> Markup:
    step = f"{verdict.step[:1].upper()}{verdict.step[1:]}"
    effect = verdict.entropy
    if effect.change == 0 and not effect.established:
        return Markup("{} is predicted to leave the policy’s entropy as it is.").format(step)
    verb = "lower" if effect.change < 0 else "raise"
    if verdict.relative is not None and verdict.low is not None and verdict.high is not None:
        size = numbers.percent(abs(verdict.relative))
        bounds = Markup("95\N{NO-BREAK SPACE}%: {} to {}").format(
            numbers.percent(verdict.low, signed=True), numbers.percent(verdict.high, signed=True)
        )
    else:
        size = Markup("{} {}").format(numbers.number(abs(effect.change)), effect.unit)
        bounds = Markup("95\N{NO-BREAK SPACE}%: {} to {}").format(
            numbers.number(effect.low, signed=True), numbers.number(effect.high, signed=True)
        )
    if effect.established:
        return Markup("{} is predicted to {} the policy’s entropy by <strong>{}</strong> ({}).").format(
            step, verb, size, bounds
        )
    return Markup(
        "{} is predicted to {} the policy’s entropy by <strong>{}</strong> ({}); its sign is not "
        "established."
    ).format(step, verb, size, bounds)


def _effects(results: Results, verdict: Verdict) -> Table:
    at: Markup | str = ", per unit of learning rate"
    if verdict.eta:
        at = Markup(", learning rate {}").format(numbers.setting(verdict.eta))
    entropy = next((row for row in results.sweep if row.is_next_lr), None)
    measured: Cell = None
    if entropy is not None:
        reliable = entropy.verdict != "resample" and not entropy.rounding
        measured = numbers.change(
            entropy.measured.value, entropy.measured_interval_given_U if reliable else None
        )
    rows = [Row(_effect(verdict.entropy, results.entropy_interval, measured), True)]
    for effect, one in zip(verdict.observables, results.observables, strict=True):
        row: ObservableRow | None = next((row for row in one.sweep if row.is_next_lr), None)
        shown = numbers.change(row.measured.value, row.measured_interval_given_U) if row else None
        rows.append(Row(_effect(effect, one.interval, shown)))
    return Table(
        Markup(
            "What the step changes{}. ± is half a 95 % interval: of the predicted change over what the "
            "column beside it says, of the measured change over E, with U and so the step held fixed."
        ).format(at),
        [
            Column("", text=True),
            Column("Now"),
            Column("Predicted change"),
            Column("± over", text=True),
            Column("Measured change"),
            Column("Unit", text=True),
            Column("Verdict", text=True),
        ],
        rows,
        "Table: what the step changes",
    )


def _effect(effect: Effect, at_theta: Interval, measured: Cell) -> list[Cell]:
    falls = "falls" if effect.change < 0 else "rises"
    interval = Interval(low=effect.low, high=effect.high)
    return [
        observable_label(effect.name),
        numbers.level(effect.at_theta, at_theta),
        numbers.change(effect.change, interval),
        effect.over,
        measured,
        effect.unit,
        falls if effect.established else "sign not established",
    ]


def _kl(run: SavedRun) -> str:
    names = [*(one.name for one in run.results.observables), "kl_base"]
    return again(run, f"measure.observables={json.dumps(names)}")


def _causes(verdict: Verdict) -> Table | None:
    if not verdict.causes:
        return None
    fractions = all(cause.fraction is not None for cause in verdict.causes)
    signs = (
        "" if fractions else " The parts have either sign, so that they are no fractions of the whole."
    )
    return Table(
        f"The parts of the predicted change, {verdict.entropy.unit}; they sum to it.{signs}",
        [
            Column("Part of the step", text=True),
            Column("Change"),
            *([Column("Of all")] if fractions else []),
        ],
        [
            Row(
                [
                    cause.name,
                    numbers.number(cause.change, signed=True),
                    *([numbers.percent(cause.fraction or 0.0)] if fractions else []),
                ]
            )
            for cause in verdict.causes
        ],
        "Table: causes",
    )


def _rule(own: RuleRow, row: RuleRow) -> Markup:
    entropy, before = row.entropy, own.entropy
    interval = entropy.measured_interval_given_U
    if interval is None or interval.high < 0:
        found = "No rule compared here keeps the entropy; loses the least:"
    elif interval.low > 0:
        found = "Raises the entropy:"
    else:
        found = "Under this rule the entropy is not known to fall (the interval holds 0):"
    reward = Markup("")
    if row.reward is not None:
        reward = Markup(" The reward changes by {} against the run’s own rule.").format(
            numbers.change(row.reward.difference.value, row.reward.difference_interval)
        )
    return Markup(
        "{} <code>{}</code>: one step changes the entropy by {} {} instead of {}, as measured.{}"
    ).format(
        found,
        row.rule,
        numbers.change(entropy.measured.value, entropy.measured_interval_given_U),
        entropy.measured.unit,
        numbers.change(before.measured.value, before.measured_interval_given_U),
        reward,
    )
