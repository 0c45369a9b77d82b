"""The section of the sweep: every learning rate with its numbers, and what is fitted to them."""

from typing import NamedTuple

from markupsafe import Markup

from ..config.estimation import observable_label
from ..results.observable_sections import Observable
from ..results.quantity import Quantity
from ..results.saved import SavedRun
from ..results.schema import Results
from ..results.sweep_sections import LinearUntil, SweepRow
from ..results.verdict import covered
from . import numbers
from .table import Cell, Column, Fact, Row, Table


class Curve(NamedTuple):
    """What the template of the section shows."""

    sweep: Table
    facts: list[Fact]
    reasons: list[Markup | str]
    """Why a row of the table is not to be relied on."""
    observables: list[Table]


def curve(run: SavedRun) -> Curve:
    """Predicted and measured change against the learning rate."""
    results = run.results
    return Curve(
        _sweep(results),
        _facts(results),
        _reasons(results),
        [_observable(o) for o in results.observables],
    )


def learning_rate(eta: float, is_next: bool) -> Markup:
    """With a word where it is that of the next step."""
    shown = numbers.setting(eta)
    return shown + Markup(' <span class="tag">next step</span>') if is_next else shown


def _sweep(results: Results) -> Table:
    quadratic = results.second_order is not None
    over = covered(results)
    columns = [
        Column("Learning rate η"),
        Column("Predicted", f"± over {over}"),
        *([Column("With quadratic term")] if quadratic else []),
        Column("Measured", "± over E, U given"),
        Column("Difference", "± same samples"),
        Column("Ratio"),
        Column("ESS", f"of {results.counts.E_sequences}"),
        Column("Weights", text=True),
    ]
    return Table(
        f"Change of the entropy, {results.entropy.unit}, at θ + ηv. Predicted: η times the derivative "
        f"along v; ± is half a 95 % interval over {over}. Measured: by importance sampling on the "
        f"{results.counts.E_sequences} responses of E; its interval is over E, with U and so v held "
        "fixed. Difference: measured − predicted, on the same samples; ratio: measured / predicted. "
        "ESS: effective sample size of the importance weights.",
        columns,
        [Row(_cells(row, quadratic), row.is_next_lr) for row in results.sweep],
        "Table: entropy change by learning rate",
    )


def _cells(row: SweepRow, quadratic: bool) -> list[Cell]:
    reliable = row.verdict != "resample" and not row.rounding
    second = row.second_order
    return [
        learning_rate(row.eta, row.is_next_lr),
        numbers.change(row.predicted.value, row.interval_total),
        *(
            [numbers.number(second.value, 4, signed=True) if second else numbers.NONE]
            if quadratic
            else []
        ),
        numbers.change(row.measured.value, row.measured_interval_given_U if reliable else None),
        numbers.change(row.difference.value, row.difference_interval) if reliable else numbers.NONE,
        numbers.number(row.ratio.value, 5) if reliable else numbers.NONE,
        numbers.number(row.ess.value, 4),
        "rounding" if row.rounding else row.verdict,
    ]


def _second(predicted: Quantity | None) -> Markup:
    return numbers.number(predicted.value, 4, signed=True) if predicted else numbers.NONE


def _facts(results: Results) -> list[Fact]:
    fit, second, found = results.fit, results.second_order, []
    line = fit.linear
    if line.slope is None:
        found.append(("Linear fit", f"none: {line.reason}"))
    else:
        found.append(
            (
                "Linear fit",
                Markup(
                    "slope {}, from {} learning rates between {} and {} (±: scatter about the line)"
                ).format(
                    numbers.change(line.slope, line.slope_interval),
                    numbers.count(line.points),
                    numbers.setting(line.eta_low),
                    numbers.setting(line.eta_high),
                ),
            )
        )
    first = results.first_order
    found.append(
        (
            "Derivative along v",
            Markup("{} {} (± 95 % over {})").format(
                numbers.change(first.derivative.value, first.interval_total),
                first.derivative.unit,
                covered(results),
            ),
        )
    )
    if second is None:
        found.append(
            ("Second derivative", 'not computed: measure.second_order = "difference" computes it')
        )
    else:
        found += [
            (
                "Second derivative along v",
                Markup("{} ({}; ± 95 % over E, given U)").format(
                    numbers.change(second.second_derivative.value, second.interval_given_U),
                    second.method,
                ),
            ),
            ("First order holds until", _until(second.linear_until)),
        ]
    if fit.rounding_eta:
        found.append(
            (
                "Numerical floor",
                Markup("η = {}, below which rounding exceeds 10 % of the measured change").format(
                    numbers.number(fit.rounding_eta.value, 2)
                ),
            )
        )
    return found


def _until(until: LinearUntil) -> Markup | str:
    if until.eta is None:
        return "any learning rate: there is no curvature"
    if until.high is None:
        bound = Markup("at least {}; the second derivative is indistinguishable from 0").format(
            numbers.number(until.low, 2)
        )
    else:
        bound = Markup("95 %: {} to {}").format(
            numbers.number(until.low, 2), numbers.number(until.high, 2)
        )
    return Markup("η = {} ({}), where the quadratic term is 10 % of the linear one").format(
        numbers.number(until.eta, 2), bound
    )


def _reasons(results: Results) -> list[Markup | str]:
    found: list[Markup | str] = []
    for row in results.sweep:
        if row.verdict != "trust":
            found.append(
                Markup("{} at η = {}: {}").format(
                    row.verdict, numbers.setting(row.eta), row.verdict_reason
                )
            )
        if row.resampled:
            resampled = row.resampled
            found.append(
                Markup("Sampled anew at θ + {} v: {} {} (± 95 % over E); {} cut off").format(
                    numbers.setting(row.eta),
                    numbers.change(resampled.change.value, resampled.interval),
                    results.entropy.unit,
                    numbers.count(resampled.cut_off),
                )
            )
    unreliable = [row for row in results.sweep if row.verdict == "resample"]
    if unreliable and not any(row.resampled for row in unreliable):
        found.append(
            "To sample responses at those learning rates, run again with --set measure.resample=true."
        )
    return found


def _observable(one: Observable) -> Table:
    name = observable_label(one.name)
    rows: list[list[Cell]] = [
        [
            learning_rate(row.eta, row.is_next_lr),
            numbers.change(row.predicted.value, row.interval_given_U),
            numbers.change(row.measured.value, row.measured_interval_given_U),
            numbers.change(row.difference.value, row.difference_interval),
            numbers.number(row.ratio.value, 4) if row.ratio else numbers.NONE,
        ]
        for row in one.sweep
    ]
    columns = [
        Column("Learning rate η"),
        *(Column(c, "± over E, U given") for c in ("Predicted", "Measured")),
        Column("Difference", "± on the same samples"),
        Column("Ratio", "measured / predicted"),
    ]
    marked = [row.is_next_lr for row in one.sweep]
    return Table(
        Markup(
            "Change of {}, on {} responses of E; at θ it is {}. ± is half a 95 % interval over E, "
            "with U and so v held fixed; difference: measured − predicted."
        ).format(
            name if name == one.at_theta.unit else f"{name}, {one.at_theta.unit}",
            numbers.count(one.responses),
            numbers.level(one.at_theta.value, one.interval),
        ),
        columns,
        [Row(cells, mark) for cells, mark in zip(rows, marked, strict=True)],
        f"Table: change of {name} by learning rate",
    )
