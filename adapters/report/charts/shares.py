"""Bars of shares of the derivative along v, with their intervals: what most figures of causes are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt

from ...results.quantity import Interval
from ..figure import WIDTH
from ..theme import BY_NAME
from .pieces import Amounts, Chart, heading, inline, interval_text, padded, scaled, zero_line

STEP = 23  # pixels from one bar to the next
SIDES = 16  # pixels that are neither names nor bars
# Edge and fill: in the strong colour no interval would be seen.
FALLS, RISES, SUM = ("falls", "falls-2"), ("rises", "rises-2"), ("muted", "rule")


class Bar(NamedTuple):
    """A share by its name, which is of others where it is a prompt's or a module's."""

    name: str
    share: float
    interval: Interval | None = None
    sum: bool = False
    """Whether it is a sum of others, drawn in grey."""


def share_bars(bars: Sequence[Bar], amounts: Amounts, title: str, *, names: int) -> Chart:
    """A panel with a bar for each, in this order, from 0; `names`: pixels for the names."""
    rows = []
    for bar in bars:
        low, high = (bar.interval.low, bar.interval.high) if bar.interval else (None, None)
        edge, fill = SUM if bar.sum else FALLS if bar.share < 0 else RISES
        row: dict[str, Any] = {"name": _short(bar.name, names), "share": amounts.factor * bar.share}
        row |= {"edge": BY_NAME[edge], "fill": BY_NAME[fill]}
        row["low"], row["high"] = (None if x is None else amounts.factor * x for x in (low, high))
        rows.append(row)
    values = [row[key] for row in rows for key in ("share", "low", "high")]
    axis = scaled(values)
    x = alt.X(
        "share:Q",
        title=None,
        scale=alt.Scale(domain=padded(values), nice=False),
        axis=alt.Axis(labelExpr=axis.labels, tickCount=5, labelFlush=True),
    )
    y = alt.Y(
        "name:N",
        title=None,
        sort=None,
        scale=alt.Scale(domain=[row["name"] for row in rows], paddingInner=0.25, paddingOuter=0.15),
        axis=alt.Axis(
            labelLimit=names - 10, minExtent=names, maxExtent=names, domain=False, ticks=False
        ),
    )
    data = alt.Chart(inline(rows))
    mark = data.mark_bar(strokeWidth=1.3).encode(
        x=x, y=y, fill=alt.Fill("fill:N", scale=None), stroke=alt.Stroke("edge:N", scale=None)
    )
    known = alt.Chart(inline(row for row in rows if row["low"] is not None))
    whiskers = known.mark_rule(color=BY_NAME["ink"], strokeWidth=1.8).encode(
        x="low:Q", x2="high:Q", y=y
    )
    return alt.layer(mark, zero_line(across=True), whiskers).properties(
        width=WIDTH - names - SIDES,
        height=STEP * len(bars),
        title=heading(axis.title(title, amounts.unit)),
    )


def _short(name: str, pixels: int) -> str:
    """What about fits; for each letter that does not, the renderer would measure the text again."""
    most = pixels // 7
    return name if len(name) <= most else name[: most - 1] + "…"


def listed(bars: Sequence[Bar], amounts: Amounts) -> str:
    """The bars in words."""
    words = (f"{b.name}: {interval_text(b.share, b.interval, amounts.factor)}" for b in bars)
    return f"{'; '.join(words)} {amounts.unit}."
