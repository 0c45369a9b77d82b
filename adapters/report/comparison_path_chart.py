"""The figure of the entropy over training: measured, predicted, logged."""

from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt

from ..results.comparison_sections import Comparison, EntropyPath
from ..results.quantity import Interval
from .charts.pieces import Chart, grammar, inline, number, padded
from .figure import WIDTH, Figure
from .theme import BY_NAME

HEIGHT = 260
COLOURS = {
    "measured on E": "measured",
    "predicted from each checkpoint": "predicted",
    "predictions added up": "other",
    "logged by the trainer": "fourth",
}
MEASURED, FORWARD, SUM, LOGGED = COLOURS
Rows = list[dict[str, Any]]


def path_figure(comparison: Comparison, path: EntropyPath) -> Figure:
    """Points with intervals, fans from each, their sum in a band, and the trainer's own entropy."""
    first, last = comparison.runs[0].step or 0, comparison.runs[-1].step or 0
    logged = [
        {"step": one.step, "value": one.entropy, "kind": LOGGED}
        for one in path.logged
        if first <= one.step <= last
    ]
    counts, end, runs = len(path.between), path.reached[-1], comparison.runs
    of_trainer = (
        "Thin line: the entropy that the trainer logged, of its own batches, without an interval."
        if logged
        else f"No entropy of the trainer: {path.logged_what}."
    )
    return Figure(
        "entropy-path",
        "Entropy over training: predicted, measured, logged",
        f"{len(runs)} checkpoints. Points: the entropy on E with its 95 % interval over E’s draws. "
        "Solid lines: the change that each checkpoint predicts until the next one; fans: its 95 % "
        "interval over E and batches. Dashed: these changes added up from the first checkpoint, in a "
        f"band of at least 95 % that adds their errors up. {of_trainer}",
        f"From step {first} to {last} the measured entropy goes from "
        f"{number(runs[0].entropy.value, 4)} to {number(runs[-1].entropy.value, 4)}; the predictions "
        f"add up to {number(end.entropy, 4)}; {path.agree} of {counts} predicted changes agree with "
        "the actual ones.",
        grammar(_chart(comparison, path, logged).properties(width=WIDTH - 80, height=HEIGHT)),
    )


def _chart(comparison: Comparison, path: EntropyPath, logged: Rows) -> Chart:
    measured: Rows = [
        {"step": run.step, "value": run.entropy.value, "kind": MEASURED} | bounds(run.entropy_interval)
        for run in comparison.runs
    ]
    added: Rows = [
        {"step": one.step, "value": one.entropy, "kind": SUM, **bounds(one.interval)}
        for one in path.reached
    ]
    fans = _fans(comparison, path)
    kinds = [kind for kind in COLOURS if kind != LOGGED or logged]
    colour = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=kinds, range=[BY_NAME[COLOURS[kind]] for kind in kinds]),
        legend=alt.Legend(
            orient="top",
            columns=2,
            symbolType="stroke",
            symbolStrokeWidth=3,
            symbolOpacity=1,
            labelLimit=220,
        ),
    )
    intervals = [row[side] for row in (*measured, *fans, *added) for side in ("low", "high")]
    room = padded([*intervals, *(row["value"] for row in logged)], zero=False)
    scale = alt.Scale(domain=room, nice=False)
    y = alt.Y("value:Q", title=f"entropy, {comparison.unit}", scale=scale)
    low, x = alt.Y("low:Q", scale=scale), step_axis()

    def band(rows: Iterable[Mapping[str, Any]], opacity: float, *detail: str) -> Chart:
        mark = alt.Chart(inline(rows)).mark_area(opacity=opacity)
        return mark.encode(x=x, y=low, y2="high:Q", color=colour, detail=list(detail))

    def line(rows: Iterable[Mapping[str, Any]], *detail: str, **mark: Any) -> Chart:
        lines = alt.Chart(inline(rows)).mark_line(**mark)
        return lines.encode(x=x, y=y, color=colour, detail=list(detail))

    points = alt.Chart(inline(measured))
    return alt.layer(
        band(added, 0.12),
        band(fans, 0.28, "of:Q"),
        *([line(logged, strokeWidth=1.2, point={"size": 14})] if logged else []),
        line(added, strokeWidth=2, strokeDash=[6, 4]),
        line(fans, "of:Q", strokeWidth=2),
        points.mark_rule(strokeWidth=2).encode(x=x, y=low, y2="high:Q", color=colour),
        points.mark_point(filled=True, size=50, opacity=1).encode(x=x, y=y, color=colour),
    )


def _fans(comparison: Comparison, path: EntropyPath) -> Rows:
    rows: Rows = []
    for one, run in zip(path.between, comparison.runs, strict=False):
        start, interval = run.entropy.value, one.predicted_interval
        of = {"of": one.first, "kind": FORWARD}
        rows.append(of | {"step": one.first, "value": start, "low": start, "high": start})
        ends = {"value": start + one.predicted, "low": start + interval.low}
        rows.append(of | {"step": one.last, "high": start + interval.high} | ends)
    return rows


def bounds(interval: Interval) -> dict[str, float]:
    """As the columns of a chart's data."""
    return {"low": interval.low, "high": interval.high}


def step_axis() -> alt.X:
    """Of training steps, the first and last of them with room."""
    return alt.X(
        "step:Q",
        title="optimizer steps taken",
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis(grid=False, tickMinStep=1, format="d"),
    )
