"""Predicted and measured change of the entropy against the learning rate, and where to trust them."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from ...results.saved import SavedRun
from ...results.schema import Results
from ...results.verdict import covered
from ..figure import Figure
from ..theme import BY_NAME
from .pieces import (
    Chart,
    eta_axis,
    eta_text,
    grammar,
    haloed,
    heading,
    inline,
    interval_text,
    intervals,
    scaled,
    zero_line,
)
from .trust import Limit, limits, shade, strip

PLOT = 386  # pixels of an axis of learning rates
LABELS = 50  # pixels left of it
POINTS = 61  # of a curve
EDGE = 0.04  # of a panel's height, between its edge and a point that lies outside
VERDICTS = {
    "trust": "measured",
    "caution": "measured, weights: caution",
    "resample": "measured, weights: resample",
}
FRESH = "measured by new responses"
SHAPES = {
    VERDICTS["trust"]: "circle",
    VERDICTS["caution"]: "triangle-up",
    VERDICTS["resample"]: "cross",
    FRESH: "diamond",
}
LINES = {"predicted": ("predicted", [1, 0]), "with the quadratic term": ("other", [6, 4])}
STROKE: dict[str, Any] = {"symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolSize": 400}


def sweep(run: SavedRun) -> Figure | None:
    """Change against eta, and change over eta, with intervals, the quadratic curve and the limits."""
    results = run.results
    etas = [row.eta for row in results.sweep]
    room = 1.7 if len(etas) > 1 else 4.0
    domain = [min(etas) / room, max(etas) * room]
    found, unit = limits(results, domain), results.entropy.unit
    panels = [
        *([strip(found, domain, PLOT)] if found else []),
        _panel(results, domain, found, rate=False, title="change of the entropy", unit=unit),
        _panel(results, domain, found, rate=True, title="change / learning rate", unit=unit),
    ]
    chart = alt.vconcat(*panels, spacing=12).resolve_scale(
        color="independent",
        strokeDash="independent",
        shape="independent",
        stroke="independent",
        fill="independent",
    )
    return Figure(
        "sweep",
        "Predicted and measured change of the entropy against the learning rate",
        _caption(results, domain),
        _description(results, found),
        grammar(chart),
    )


def _points(results: Results, *, rate: bool) -> list[dict[str, Any]]:
    """Measured changes, and those of responses sampled anew, per unit of eta or as they are."""
    rows = []
    for row in results.sweep:
        over = row.eta if rate else 1.0
        measured = [(VERDICTS[row.verdict], row.measured, row.measured_interval_given_U)]
        if row.resampled:
            measured.append((FRESH, row.resampled.change, row.resampled.interval))
        for how, change, interval in measured:
            low, high = (interval.low / over, interval.high / over) if interval else (None, None)
            point = {"eta": row.eta, "how": how, "value": change.value / over, "low": low, "high": high}
            rows.append({**point, "rounding": row.rounding})
    return rows


def _curves(results: Results, domain: Sequence[float], *, rate: bool) -> list[dict[str, Any]]:
    """The line of first order with its interval, and the parabola, at many etas."""
    first, second = results.first_order, results.second_order
    total, slope = first.interval_total, first.derivative.value
    low, high = (math.log(x) for x in domain)
    rows: list[dict[str, Any]] = []
    for i in range(POINTS):
        eta = math.exp(low + (high - low) * i / (POINTS - 1))
        times = 1.0 if rate else eta
        band = {"low": times * total.low, "high": times * total.high}
        rows.append({"eta": eta, "line": "predicted", "value": times * slope, **band})
        if second is not None:
            value = times * (slope + eta * second.second_derivative.value / 2)
            rows.append({"eta": eta, "line": "with the quadratic term", "value": value})
    return rows


def _panel(
    results: Results,
    domain: Sequence[float],
    found: Sequence[Limit],
    *,
    rate: bool,
    title: str,
    unit: str,
) -> Chart:
    points, curves = _points(results, rate=rate), _curves(results, domain, rate=rate)
    low, high = _heights(points, curves)
    inside = low + EDGE * (high - low), high - EDGE * (high - low)
    for point in points:
        point["shown"] = min(max(point["value"], inside[0]), inside[1])
        if point["low"] is not None:
            point["low"], point["high"] = max(point["low"], low), min(point["high"], high)
    axis = scaled((low, high))
    x = eta_axis(domain, title="learning rate" if rate else None)
    labels = alt.Axis(
        labelExpr=axis.labels, tickCount=5, minExtent=LABELS, maxExtent=LABELS, domain=False
    )
    scale = alt.Scale(domain=[low, high], nice=False)
    y = alt.Y("value:Q", title=None, scale=scale, axis=labels)
    lines = alt.Chart(inline(curves))
    band = lines.transform_filter(alt.datum.line == "predicted").mark_area(opacity=0.2)
    kept = [p for p in points if p["shown"] == p["value"]]
    drawn = (
        *([shade(found, x)] if found else []),
        zero_line(),
        band.encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
        *_next_lr(results, x, named=not rate),
        _lines(lines, {row["line"] for row in curves}, legend=not rate).encode(x=x, y=y),
        intervals(kept, x, low="low", high="high", colour="measured"),
        _marks(points, x, legend=not rate),
    )
    return alt.layer(*drawn).properties(
        width=PLOT, height=150 if rate else 190, title=heading(axis.title(title, unit))
    )


def _heights(points: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Of what is no rounding; intervals at most as far again as all values and the band reach."""
    clear = [p for p in points if not p["rounding"]] or points
    core = [c[key] for c in curves for key in ("value", "low", "high") if key in c]
    core += [p["value"] for p in clear] + [0.0]
    low, high = min(core), max(core)
    room = high - low or 1.0
    bars = [p[key] for p in clear for key in ("low", "high") if p[key] is not None]
    low = min(low, max(min(bars, default=low), low - room))
    high = max(high, min(max(bars, default=high), high + room))
    return low - 0.06 * (high - low or 1.0), high + 0.06 * (high - low or 1.0)


def _lines(chart: Chart, found: set[str], *, legend: bool) -> Chart:
    names = [name for name in LINES if name in found]
    shown = _legend(**STROKE) if legend else None
    colours = alt.Scale(domain=names, range=[BY_NAME[LINES[name][0]] for name in names])
    dashes = alt.Scale(domain=names, range=[LINES[name][1] for name in names])
    return chart.mark_line(strokeWidth=2, clip=True).encode(
        color=alt.Color("line:N", scale=colours, legend=shown),
        strokeDash=alt.StrokeDash("line:N", scale=dashes, legend=shown),
    )


def _marks(points: Sequence[dict[str, Any]], x: alt.X, *, legend: bool) -> Chart:
    kinds = [kind for kind in SHAPES if any(p["how"] == kind for p in points)]
    shown = _legend(symbolStrokeWidth=1.8) if legend else None
    fills = [BY_NAME["measured" if kind == VERDICTS["trust"] else "page"] for kind in kinds]
    strokes, shapes = [BY_NAME["measured"]] * len(kinds), [SHAPES[kind] for kind in kinds]
    mark = alt.Chart(inline(points)).mark_point(size=60, strokeWidth=1.8, opacity=1)
    return mark.encode(
        x=x,
        y="shown:Q",
        shape=alt.Shape("how:N", scale=alt.Scale(domain=kinds, range=shapes), legend=shown),
        stroke=alt.Stroke("how:N", scale=alt.Scale(domain=kinds, range=strokes), legend=shown),
        fill=alt.Fill("how:N", scale=alt.Scale(domain=kinds, range=fills), legend=shown),
    )


def _legend(**more: Any) -> alt.Legend:
    return alt.Legend(title=None, orient="top", direction="vertical", labelLimit=220, offset=2, **more)


def _next_lr(results: Results, x: alt.X, *, named: bool) -> list[Chart]:
    known = [row.eta for row in results.sweep if row.is_next_lr]
    if not known:
        return []
    data = inline([{"eta": known[0], "name": f"next learning rate, {eta_text(known[0])}"}])
    rule = alt.Chart(data).mark_rule(strokeDash=[2, 3], color=BY_NAME["ink"]).encode(x=x)
    falls = results.first_order.derivative.value < 0  # the curve is at the other edge
    place = {"y": "height", "baseline": "bottom"} if falls else {"y": 0, "baseline": "top"}
    name = haloed(alt.Chart(data).encode(x=x, text="name:N"), align="right", dx=-6, **place)
    return [rule, name] if named else [rule]


def _caption(results: Results, domain: Sequence[float]) -> str:
    counts, rows = results.counts, results.sweep
    sentences = [
        f"Predicted change (line, with its 95 % interval over {covered(results)}) and measured change "
        "(points, with 95 % intervals over E, U given) at "
        f"{len(rows)} learning rate{'s' if len(rows) > 1 else ''}; below, both over the learning rate, "
        f"which is constant to first order. E: {counts.E_sequences} responses to {counts.E_prompts} "
        f"prompts; U: {counts.U_sequences} responses to {counts.U_prompts} prompts."
    ]
    if results.second_order is not None:
        until = results.second_order.linear_until.eta
        where = "" if until is None else f", which is 10 % of the linear one at {eta_text(until)}"
        beyond = ", beyond the axis" if until is not None and until > domain[1] else ""
        sentences.append(f"Dashed: with the quadratic term{where}{beyond}.")
    floor = results.fit.rounding_eta
    if floor is not None:
        below = "" if floor.value >= domain[0] else ", below the axis"
        sentences.append(
            "Rounding exceeds 10 % of the change below a learning rate of "
            f"{eta_text(floor.value)}{below}."
        )
    if doubted := [f"{eta_text(r.eta)} {r.verdict}" for r in rows if r.verdict != "trust"]:
        sentences.append(
            f"Hollow: the importance weights leave too few effective responses ({', '.join(doubted)}); "
            "without an interval where the verdict is to resample."
        )
    if any(row.rounding for row in rows):
        sentences.append("Points that rounding moves out of the panel stand at its edge.")
    return " ".join(sentences)


def _description(results: Results, found: Sequence[Limit]) -> str:
    unit, lines = results.entropy.unit, []
    for row in results.sweep:
        predicted = interval_text(row.predicted.value, row.interval_total)
        measured = interval_text(row.measured.value, row.measured_interval_given_U)
        which = " (the next step)" if row.is_next_lr else ""
        lines.append(
            f"At learning rate {eta_text(row.eta)}{which}: predicted {predicted}, measured {measured} "
            f"{unit}; importance weights: {row.verdict}."
        )
    lines += [f"{x.name}: from {eta_text(x.low)} to {eta_text(x.high)}." for x in found]
    return " ".join(lines)
