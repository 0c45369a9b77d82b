"""What else the step changes: reward, length, and what was asked for."""

import altair as alt

from ...config.estimation import observable_label
from ...results.observable_sections import Observable, ObservableRow
from ...results.saved import SavedRun
from ..figure import WIDTH, Figure
from ..theme import BY_NAME
from .pieces import (
    Chart,
    eta_text,
    grammar,
    heading,
    inline,
    interval_text,
    intervals,
    label,
    number,
    padded,
    scaled,
    zero_line,
)

NAMES = 84  # pixels
KINDS = {"predicted": "square", "measured": "circle"}


def observables(run: SavedRun) -> Figure | None:
    """Predicted and measured change of each, at the next learning rate or the largest of the sweep."""
    found = [(one, _row(one)) for one in run.results.observables if one.sweep]
    if not found:
        return None
    eta = found[0][1].eta
    which = "the next learning rate" if found[0][1].is_next_lr else "the largest learning rate"
    lost = [
        name for one, row in found if row.measured_interval_given_U is None for name in (_name(one),)
    ]
    said = f" Without an interval, as the importance weights fail: {', '.join(lost)}." if lost else ""
    counts = {_name(one): one.responses for one, _ in found}
    alike = len(set(counts.values())) == 1
    each = (f"{name}: {count}" for name, count in counts.items())
    counted = str(found[0][0].responses) if alike else ", ".join(each)
    return Figure(
        "observables",
        "What else the step changes",
        f"Predicted and measured changes at {which}, {eta_text(eta)}, with 95 % intervals over the "
        f"responses of E ({counted}), U given; each on an axis of its own.{said}",
        " ".join(_words(one, row) for one, row in found),
        grammar(
            alt.vconcat(*(_panel(one, row) for one, row in found), spacing=14).resolve_scale(
                x="independent", y="independent"
            )
        ),
    )


def _row(one: Observable) -> ObservableRow:
    return next((row for row in one.sweep if row.is_next_lr), one.sweep[-1])


def _name(one: Observable) -> str:
    return label(observable_label(one.name), 22, 10)


def _panel(one: Observable, row: ObservableRow) -> Chart:
    rows = []
    for kind, change, interval in (
        ("predicted", row.predicted, row.interval_given_U),
        ("measured", row.measured, row.measured_interval_given_U),
    ):
        low, high = (interval.low, interval.high) if interval else (None, None)
        rows.append({"kind": kind, "change": change.value, "low": low, "high": high})
    values = [r[key] for r in rows for key in ("change", "low", "high")]
    axis = scaled(v for v in values if isinstance(v, float))
    x = alt.X(
        "change:Q",
        title=None,
        scale=alt.Scale(domain=padded(v for v in values if isinstance(v, float)), nice=False),
        axis=alt.Axis(labelExpr=axis.labels, tickCount=5),
    )
    names = alt.Axis(minExtent=NAMES, maxExtent=NAMES, domain=False, ticks=False)
    y = alt.Y("kind:N", title=None, sort=None, axis=names)
    kinds = list(KINDS)
    points = alt.Chart(inline(rows)).mark_point(size=70, opacity=1, filled=True)
    unit = axis.title("change", label(row.predicted.unit, 20, 6))
    return alt.layer(
        zero_line(across=True),
        *(
            intervals(
                [r for r in rows if r["kind"] == kind],
                y,
                low="low",
                high="high",
                colour=kind,
                across=True,
            )
            for kind in kinds
        ),
        points.encode(
            x=x,
            y=y,
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=kinds, range=[BY_NAME[k] for k in kinds]),
                legend=None,
            ),
            shape=alt.Shape(
                "kind:N",
                scale=alt.Scale(domain=kinds, range=list(KINDS.values())),
                legend=None,
            ),
        ),
    ).properties(
        width=WIDTH - NAMES - 18,
        height=46,
        title=heading(f"{_name(one)}, {number(one.at_theta.value)} before the step: {unit}"),
    )


def _words(one: Observable, row: ObservableRow) -> str:
    predicted = interval_text(row.predicted.value, row.interval_given_U)
    measured = interval_text(row.measured.value, row.measured_interval_given_U)
    at = interval_text(one.at_theta.value, one.interval)
    unit = label(row.predicted.unit, 20, 6)
    return f"{_name(one)}: {at} before the step; predicted {predicted}, measured {measured} {unit}."
