"""Rules of the next step: entropy against reward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt

from ...results.saved import SavedRun
from ...results.whatif_sections import FrontierPoint, WhatIf
from ..figure import WIDTH, Figure
from ..theme import BY_NAME, TEXT
from .pieces import Chart, eta_text, grammar, haloed, inline, intervals, label, number, padded, scaled

LEFT = 64  # pixels of the axis of rewards
PLOT = WIDTH - LEFT - 14, 300  # pixels across and up
LINE = TEXT + 3  # pixels of a line of text
WIDE = 0.53 * TEXT  # pixels of a character, about
GAP = 8  # pixels from a point to its name
OWN = "own"


class Box(NamedTuple):
    """Of a text or a point, in pixels from the lower left."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: "Box") -> bool:
        return not (
            self.right < other.left
            or other.right < self.left
            or self.top < other.bottom
            or other.top < self.bottom
        )


def frontier(run: SavedRun) -> Figure | None:
    """Measured changes of entropy and reward under every rule of whatif.json, if there is one."""
    document = run.whatif
    if document is None or document.frontier is None or not document.frontier.points:
        return None
    points = document.frontier.points
    rows = [_row(point) for point in sorted(points, key=lambda p: p.rule == OWN)]  # that on top
    x_domain = padded([row[key] for row in rows for key in ("entropy", "left", "right")])
    y_domain = padded([row[key] for row in rows for key in ("reward", "low", "high")])
    names = placed(points, x_domain, y_domain)
    across = scaled([row["entropy"] for row in rows])
    up = scaled([row["reward"] for row in rows])
    x = alt.X(
        "entropy:Q",
        scale=alt.Scale(domain=x_domain, nice=False),
        axis=alt.Axis(labelExpr=across.labels, tickCount=6),
        title=across.title("change of the entropy", document.frontier.entropy_unit),
    )
    y = alt.Y(
        "reward:Q",
        scale=alt.Scale(domain=y_domain, nice=False),
        axis=alt.Axis(labelExpr=up.labels, tickCount=6, minExtent=LEFT - 20, maxExtent=LEFT - 20),
        title=up.title("change of the reward", document.frontier.reward_unit),
    )
    fills = alt.Scale(domain=list(KINDS), range=[BY_NAME[fill] for fill, _ in KINDS.values()])
    shapes = alt.Scale(domain=list(KINDS), range=[shape for _, shape in KINDS.values()])
    legend = alt.Legend(title=None, orient="top", labelLimit=200, symbolStrokeWidth=1.6, offset=4)
    strokes = alt.Scale(
        domain=list(KINDS), range=[BY_NAME[x] for x in ("predicted", "predicted", "measured")]
    )
    marks = alt.Chart(inline(rows)).mark_point(size=64, strokeWidth=1.6, opacity=1)
    thin: dict[str, Any] = {"colour": "muted", "width": 0.7}
    crossed = [
        intervals(rows, alt.X("entropy:Q"), low="low", high="high", **thin),
        intervals(rows, alt.Y("reward:Q"), low="left", high="right", across=True, **thin),
    ]
    chart = alt.layer(
        *crossed,
        alt.Chart(inline([{"zero": 0}])).mark_rule().encode(x="zero:Q"),
        alt.Chart(inline([{"zero": 0}])).mark_rule().encode(y="zero:Q"),
        marks.encode(
            x=x,
            y=y,
            fill=alt.Fill("kind:N", scale=fills, legend=legend),
            stroke=alt.Stroke("kind:N", scale=strokes, legend=legend),
            shape=alt.Shape("kind:N", scale=shapes, legend=legend),
        ),
        *_texts(names),
    ).properties(width=PLOT[0], height=PLOT[1])
    return Figure(
        "frontier",
        "What another rule would do: entropy against reward",
        _caption(document, names),
        " ".join(_words(point, document) for point in points),
        grammar(chart),
    )


KINDS = {
    "on the frontier": ("predicted", "circle"),
    "dominated": ("page", "circle"),
    "the run's own rule": ("measured", "diamond"),
}


def _row(point: FrontierPoint) -> dict[str, Any]:
    kind = "dominated" if point.dominated else "on the frontier"
    row: dict[str, Any] = {"rule": label(point.rule), "entropy": point.entropy, "reward": point.reward}
    row["kind"] = "the run's own rule" if point.rule == OWN else kind
    for value, half, low, high in (
        (point.entropy, point.entropy_half_width, "left", "right"),
        (point.reward, point.reward_half_width, "low", "high"),
    ):
        row[low], row[high] = (None, None) if half is None else (value - half, value + half)
    return row


def placed(
    points: Sequence[FrontierPoint], x_domain: Sequence[float], y_domain: Sequence[float]
) -> list[dict[str, Any]]:
    """Names beside their points, none on another or on a point; those without a place are left out.

    The run's own first, then the frontier from its ends, which are far from the others.
    """

    def pixel(value: float, domain: Sequence[float], length: float) -> float:
        return length * (value - domain[0]) / (domain[1] - domain[0])

    at = {
        p.rule: (pixel(p.entropy, x_domain, PLOT[0]), pixel(p.reward, y_domain, PLOT[1]))
        for p in points
    }
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in at.values()]
    front = sorted((p for p in points if not p.dominated and p.rule != OWN), key=lambda p: p.entropy)
    by_end = [front[i // 2] if i % 2 else front[-1 - i // 2] for i in range(len(front))]
    own = [p for p in points if p.rule == OWN]
    found = []
    for point in [*own, *by_end]:
        x, y = at[point.rule]
        text = label(point.rule, 26, 6)
        long = WIDE * len(text)
        for align, left in (("left", x + GAP), ("right", x - GAP - long), ("center", x - long / 2)):
            for dy in (0, LINE, -LINE) if align != "center" else (LINE + 2, -LINE - 2):
                box = Box(left, y + dy - LINE / 2, left + long, y + dy + LINE / 2)
                inside = box.left >= 0 and box.right <= PLOT[0]
                inside = inside and box.bottom >= 0 and box.top <= PLOT[1]
                if inside and not any(box.meets(other) for other in taken):
                    break
            else:
                continue
            taken.append(box)
            edge = {"left": box.left, "right": box.right, "center": (box.left + box.right) / 2}[align]
            found.append({"name": text, "align": align, "x": edge, "y": PLOT[1] - y - dy})
            break
    return found


def _texts(names: Sequence[dict[str, Any]]) -> list[Chart]:
    found = []
    for align in ("left", "right", "center"):
        kept = [name for name in names if name["align"] == align]
        if kept:
            x, y = alt.X("x:Q", scale=None), alt.Y("y:Q", scale=None)
            text = alt.Chart(inline(kept)).encode(x=x, y=y, text="name:N")
            found.append(haloed(text, align=align, baseline="middle"))
    return found


def _caption(document: WhatIf, names: Sequence[dict[str, Any]]) -> str:
    assert document.frontier is not None
    points = document.frontier.points
    front = sum(not point.dominated for point in points)
    left_out = len(document.rules) - len(points)
    lost = f" {left_out} more without a reliable measurement are not shown." if left_out else ""
    return (
        f"Measured changes by one step at learning rate {eta_text(document.learning_rate.value)} under "
        f"{len(points)} rules, with 95 % intervals over the {document.counts.E_sequences} responses of "
        f"E, U given.{lost} Hollow: another rule has more of both; {front} are on the frontier, "
        "by point estimates. As all are measured on the same samples, differences between rules are "
        f"better known than these intervals. Names where there is room ({len(names)})."
    )


def _words(point: FrontierPoint, document: WhatIf) -> str:
    assert document.frontier is not None
    state = "dominated" if point.dominated else "on the frontier"
    return (
        f"{label(point.rule, 40, 10)}: entropy {number(point.entropy, signed=True)} "
        f"{document.frontier.entropy_unit}, reward {number(point.reward, signed=True)}, {state}."
    )
