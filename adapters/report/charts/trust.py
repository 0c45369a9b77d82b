"""Learning rates at which a number of the sweep is not to be relied on."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import altair as alt

from ...results.schema import Results
from ...results.sweep_sections import SweepRow
from ..theme import BY_NAME
from .pieces import Chart, heading, inline

BAR = 20  # pixels from one bar to the next


class Limit(NamedTuple):
    """A range of learning rates, and what limits the numbers there."""

    name: str
    low: float
    high: float


def limits(results: Results, domain: Sequence[float]) -> list[Limit]:
    """Within the domain: below the numerical floor, beyond linear_until, and by weights' verdicts."""
    low, high = domain
    found = []
    floor = results.fit.rounding_eta
    if floor is not None and floor.value > low:
        found.append(Limit("rounding above 10 % of the change", low, min(floor.value, high)))
    until = results.second_order.linear_until.eta if results.second_order else None
    if until is not None and until < high:
        found.append(Limit("quadratic term above 10 % of the linear", max(until, low), high))
    return found + _by_weights(results.sweep, low, high)


def _by_weights(rows: Sequence[SweepRow], low: float, high: float) -> list[Limit]:
    """Neighbours of one verdict together; the limit to the next lies halfway, in logarithms."""
    edges = [low, *(math.sqrt(a.eta * b.eta) for a, b in pairwise(rows)), high]
    found: list[Limit] = []
    for row, (start, end) in zip(rows, pairwise(edges), strict=True):
        name = f"importance weights: {row.verdict}"
        if found and found[-1].name == name and found[-1].high == start:
            found[-1] = found[-1]._replace(high=end)
        elif row.verdict != "trust":
            found.append(Limit(name, start, end))
    return found


def shade(found: Sequence[Limit], x: alt.X) -> Chart:
    """The ranges, behind everything else of a panel."""
    rows = inline({"eta": limit.low, "end": limit.high} for limit in found)
    return alt.Chart(rows).mark_rect(color=BY_NAME["band"]).encode(x=x, x2="end:Q")


def strip(found: Sequence[Limit], domain: Sequence[float], width: int) -> Chart:
    """A panel with a bar for every limit, its name at the end that is nearer to the panel's edge."""
    x = alt.X("eta:Q", scale=alt.Scale(type="log", domain=list(domain), nice=False), axis=None)
    y = alt.Y("row:O", axis=None)
    rows = []
    for i, limit in enumerate(found):
        left = limit.low * limit.high < domain[0] * domain[1]
        named = {"row": i, "eta": limit.low, "end": limit.high, "name": limit.name, "left": left}
        rows.append({**named, "at": limit.low if left else limit.high})
    bars = alt.Chart(inline(rows)).mark_rect(color=BY_NAME["rule"], height=BAR - 3)
    names = [
        alt.Chart(inline(kept))
        .mark_text(align="left" if left else "right", dx=5 if left else -5, baseline="middle")
        .encode(x="at:Q", y=y, text="name:N")
        for left in (True, False)
        if (kept := [row for row in rows if row["left"] == left])
    ]
    return alt.layer(bars.encode(x=x, x2="end:Q", y=y), *names).properties(
        width=width, height=BAR * len(rows), title=heading("where not to rely on these numbers")
    )
