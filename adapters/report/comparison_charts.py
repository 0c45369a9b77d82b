"""Figures of several runs: the next step of each, its parts, its modules, other observables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt

from ..config.estimation import observable_label
from ..results.comparison_sections import ComparedRun, Comparison, Seen
from ..results.quantity import Interval
from .charts.pieces import Chart, grammar, heading, inline, label, number, padded, scaled, zero_line
from .comparison_path_chart import bounds, path_figure, step_axis
from .figure import WIDTH, Figure
from .theme import BY_NAME, DIVERGING

HEIGHT = 210
PANEL = 120
ROW = 26  # pixels of a run in a list
PARTS = {"momentum": "predicted", "this batch": "measured", "weight decay": "other"}
SIDES = {"predicted": "predicted", "measured": "measured"}
APART = 6  # pixels between two marks of a run
MOST_PANELS = 4
CELL, CELLS = 54, 370  # pixels of a module in a run, and of all runs
STRONG = 0.6  # of the largest change, from which the page's colour is read on its colour


class _Value(NamedTuple):
    run: int
    kind: str
    value: float
    interval: Interval | None


def comparison_figures(comparison: Comparison) -> list[Figure]:
    """Those that the runs have the numbers for."""
    path = [] if comparison.path is None else [path_figure(comparison, comparison.path)]
    others = (_modules(comparison), _observables(comparison))
    return [*path, _changes(comparison), _parts(comparison), *(one for one in others if one)]


def _changes(comparison: Comparison) -> Figure:
    runs = comparison.runs
    relative = all(run.relative is not None for run in runs)
    values = []
    for i, run in enumerate(runs):
        scale = 100 / run.entropy.value if relative else 1.0
        interval = _times(scale, run.predicted_interval)
        values.append(_Value(i, "predicted", scale * run.predicted.value, interval))
        if run.measured is not None:
            measured = run.measured_interval
            interval_there = None if measured is None else _times(scale, measured)
            values.append(_Value(i, "measured", scale * run.measured.value, interval_there))
    unit = "%" if relative else runs[0].predicted.unit
    return Figure(
        "next-steps",
        "The next step of each run",
        f"Change of the entropy by the next step of each of {len(runs)} runs"
        f"{', relative to its entropy' if relative else ''}. Lines: 95 % intervals, of the predicted "
        "change over E and the prompts of U, of a measured one over E given U.",
        _described(values, runs, unit),
        _drawn(values, comparison, unit, SIDES),
    )


def _times(scale: float, interval: Interval) -> Interval:
    return Interval(low=scale * interval.low, high=scale * interval.high)


def _parts(comparison: Comparison) -> Figure:
    values = [
        _Value(i, kind, value, None)
        for i, run in enumerate(comparison.runs)
        for kind, value in zip(PARTS, (run.momentum, run.update, run.decay), strict=True)
    ]
    unit = comparison.runs[0].predicted.unit
    return Figure(
        "parts-over-runs",
        "Which part of the step makes it",
        f"Predicted change of the entropy by the next step of each of {len(comparison.runs)} runs, by "
        "the parts of the step, which sum to the whole: Adam’s first moment, this batch’s gradient, "
        "weight decay. Without intervals; a run’s own report has them.",
        _described(values, comparison.runs, unit),
        _drawn(values, comparison, unit, PARTS),
    )


def _described(values: Sequence[_Value], runs: Sequence[ComparedRun], unit: str) -> str:
    return "; ".join(
        f"{label(runs[one.run].label)}, {one.kind}: {number(one.value, signed=True)} {unit}"
        for one in values[:12]
    )


def _drawn(
    values: Sequence[_Value], comparison: Comparison, unit: str, colours: Mapping[str, str]
) -> dict[str, Any]:
    """Over the steps for checkpoints, else a line a run."""
    kinds = [kind for kind in colours if any(one.kind == kind for one in values)]
    colour = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=kinds, range=[BY_NAME[colours[kind]] for kind in kinds]),
        legend=alt.Legend(orient="top"),
    )
    ends = [x for one in values if one.interval for x in (one.interval.low, one.interval.high)]
    room = alt.Scale(domain=padded([*ends, *(one.value for one in values)]), nice=False)
    scale = scaled([*ends, *(one.value for one in values)])
    axis = alt.Axis(labelExpr=scale.labels, title=scale.title("change", unit))
    names = _names(comparison.runs)
    data = alt.Chart(inline(_row(one, comparison, names, kinds) for one in values))
    if comparison.path is not None:
        x, aside = step_axis(), alt.XOffset("at:Q", scale=None)
        y = alt.Y("value:Q", scale=room, axis=axis)
        low = alt.Y("low:Q", scale=room, axis=axis)
        layers = [
            zero_line(),
            data.mark_line(strokeWidth=1.2, opacity=0.6).encode(x=x, y=y, color=colour),
            _rule(data).encode(x=x, xOffset=aside, y=low, y2="high:Q", color=colour),
            _point(data).encode(x=x, xOffset=aside, y=y, color=colour),
        ]
        return grammar(alt.layer(*layers).properties(width=WIDTH - 80, height=HEIGHT))
    place, up = _list_axis(names), alt.YOffset("at:Q", scale=None)
    along, start = (alt.X(f"{name}:Q", scale=room, axis=axis) for name in ("value", "low"))
    layers = [
        _rule(data).encode(y=place, yOffset=up, x=start, x2="high:Q", color=colour),
        _point(data).encode(y=place, yOffset=up, x=along, color=colour),
        zero_line(across=True),
    ]
    return grammar(alt.layer(*layers).properties(width=WIDTH - 190, height=ROW * len(names) + 10))


def _row(
    one: _Value, comparison: Comparison, names: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any]:
    of_run = {"run": names[one.run], "step": comparison.runs[one.run].step}
    at = APART * (kinds.index(one.kind) - (len(kinds) - 1) / 2)
    ends = bounds(one.interval or Interval(low=one.value, high=one.value))
    return of_run | {"at": at, "kind": one.kind, "value": one.value} | ends


def _rule(data: Chart) -> Chart:
    return data.mark_rule(strokeWidth=1.8)


def _point(data: Chart, **mark: Any) -> Chart:
    return data.mark_point(filled=True, size=45, opacity=1, **mark)


def _list_axis(names: Sequence[str]) -> alt.Y:
    axis = alt.Axis(labelLimit=160, grid=False)
    return alt.Y("run:N", sort=list(names), title=None, axis=axis)


def _names(runs: Sequence[ComparedRun]) -> list[str]:
    """Each unlike the others, as a chart can show it."""
    found = [label(run.label) for run in runs]
    count = Counter(found)
    return [f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(found, start=1)]


def _modules(comparison: Comparison) -> Figure | None:
    groups = comparison.projections
    if not groups:
        return None
    over_steps = comparison.path is not None
    runs = comparison.runs
    names = [str(run.step) for run in runs] if over_steps else _names(runs)
    cells = [
        (label(group.name), name, value)
        for group in groups
        for name, value in zip(names, group.change, strict=True)
        if value is not None
    ]
    most = max((abs(value) for _, _, value in cells), default=0.0) or 1.0
    scale, unit = scaled([most]), runs[0].predicted.unit
    x = alt.X(
        "run:N",
        sort=names,
        title="optimizer steps taken" if over_steps else None,
        axis=alt.Axis(labelAngle=0 if over_steps else -30, labelLimit=110),
    )
    edges = [most * (2 * i - len(DIVERGING)) / len(DIVERGING) for i in range(1, len(DIVERGING))]
    steps = alt.Scale(type="threshold", domain=edges, range=list(DIVERGING))
    y = alt.Y("group:N", sort=[label(group.name) for group in groups], title=None)
    rows = [
        {
            "group": group,
            "run": run,
            "value": value,
            "text": number(value * 10.0**-scale.exponent, 2, signed=True),
            "strong": abs(value) > STRONG * most,
        }
        for group, run, value in cells
    ]
    data = alt.Chart(inline(rows)).encode(x=x, y=y)
    ink = alt.condition(alt.datum.strong, alt.value(BY_NAME["page"]), alt.value(BY_NAME["ink"]))
    chart = alt.layer(
        data.mark_rect(stroke=BY_NAME["rule"], strokeWidth=0.5).encode(
            color=alt.Color("value:Q", scale=steps, legend=None)
        ),
        data.mark_text(fontSize=11).encode(text="text:N", color=ink),
    ).properties(
        width=min(CELL, CELLS / len(names)) * len(names),
        height=ROW * len(groups),
        title=heading(scale.title("change", unit)),
    )
    described = [
        f"{label(group.name)}: {', '.join(number(x, 2, signed=True) for x in group.change if x)}"
        for group in groups[:6]
    ]
    return Figure(
        "modules-over-runs",
        "Which modules make it",
        f"Predicted change of the entropy by the next step of each of {len(runs)} runs, by projection, "
        "summed over layers; the page’s own colour: 0; one scale for all runs. Without intervals; a "
        "run’s own report has them.",
        "; ".join(described),
        grammar(chart),
    )


def _observables(comparison: Comparison) -> Figure | None:
    runs = comparison.runs
    of_run = [{one.name: one for one in run.observables} for run in runs]
    shared = [name for name in of_run[0] if all(name in seen for seen in of_run)][:MOST_PANELS]
    if not shared:
        return None
    panels = [_panel(comparison, name, [seen[name] for seen in of_run]) for name in shared]
    described = [
        f"{label(observable_label(name))}: "
        f"{', '.join(number(seen[name].value.value) for seen in of_run[:12])}"
        for name in shared
    ]
    return Figure(
        "observables-over-runs",
        "What else the policies differ in",
        f"On E of each of {len(runs)} runs, at theta. Lines: 95 % intervals over the draws of E.",
        "; ".join(described),
        grammar(alt.vconcat(*panels)),
    )


def _panel(comparison: Comparison, name: str, seen: Sequence[Seen]) -> Chart:
    names = _names(comparison.runs)
    room = padded([x for one in seen for x in (one.interval.low, one.interval.high)], zero=False)
    scale = alt.Scale(domain=room, nice=False)
    rows: list[dict[str, Any]] = [
        {"run": at, "step": run.step, "value": one.value.value, **bounds(one.interval)}
        for at, run, one in zip(names, comparison.runs, seen, strict=True)
    ]
    data = alt.Chart(inline(rows))
    of, unit = observable_label(name), seen[0].value.unit
    title = heading(label(of if of == unit else f"{of}, {unit}", 40, 8))
    colour = alt.value(BY_NAME["measured"])
    if comparison.path is not None:
        x, y, low = step_axis(), alt.Y("value:Q", scale=scale, title=None), alt.Y("low:Q", scale=scale)
        marks = (
            _rule(data).encode(x=x, y=low, y2="high:Q", color=colour),
            _point(data).encode(x=x, y=y, color=colour),
        )
        return alt.layer(*marks).properties(width=WIDTH - 80, height=PANEL, title=title)
    place = _list_axis(names)
    along, start = (alt.X(f"{key}:Q", scale=scale, title=None) for key in ("value", "low"))
    marks = (
        _rule(data).encode(y=place, x=start, x2="high:Q", color=colour),
        _point(data).encode(y=place, x=along, color=colour),
    )
    return alt.layer(*marks).properties(width=WIDTH - 190, height=ROW * len(names), title=title)
