"""Where in the model the predicted change is made: layers and projections."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import altair as alt

from ...results.saved import SavedRun
from ..figure import WIDTH, Figure
from ..theme import BY_NAME, DIVERGING
from .pieces import Chart, Scaled, amounts, grammar, heading, inline, label, number, scaled

NAMES = 118  # pixels for the projections
CELL = 48  # pixels across a layer, at most
HEIGHT = 24  # pixels of a projection
SIGNED = 9  # pixels of a cell from which it has a sign
COUNT = len(DIVERGING)
NUMBERED = re.compile(r"^(.*?)\.?(\d+)$")
OUTSIDE = "none"  # the layer of a module outside the numbered ones


def modules(run: SavedRun) -> Figure | None:
    """Shares of modules.parquet summed over factors, as a heat map of layers and projections."""
    table = run.table("modules")
    if table is None or table.num_rows == 0:
        return None
    found = _cells(table.select(["layer", "projection", "share"]).to_pylist())
    scale = amounts(run)
    shares = {place: scale.factor * share for place, share in found.items()}
    (row, layer), largest = max(shares.items(), key=lambda cell: abs(cell[1]))
    limit = abs(largest) or 1.0
    axis = scaled([limit])
    numbers = {layer for _, layer in shares}
    layers = sorted(numbers - {OUTSIDE}, key=int) + sorted(numbers & {OUTSIDE})
    rows = list(dict.fromkeys(row for row, _ in shares))
    cells = [{"projection": r, "layer": c, "share": share} for (r, c), share in shares.items()]
    title = axis.title("change of the entropy", scale.unit)
    chart = alt.vconcat(
        _map(cells, layers, rows, limit).properties(title=heading(title)),
        _key(limit, axis),
        spacing=12,
    ).resolve_scale(color="shared", x="independent", y="independent")
    return Figure(
        "modules",
        "Where in the model the change is made",
        f"Shares of the predicted change of the entropy, {scale.at}, by layer and projection: "
        f"{len(table)} tensors in {len(layers)} layers and {len(rows)} projections, summed over the "
        f"factors of an adapter. Of {COUNT} equal steps the middle one, in the colour of the page, "
        "holds 0. modules.parquet has the 95 % interval of every tensor.",
        f"The largest of {len(cells)} cells is {row}, layer {layer}: {number(largest, signed=True)} "
        f"{scale.unit}; {sum(share < 0 for share in shares.values())} are negative.",
        grammar(chart),
    )


def _cells(tensors: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(projection, number of the layer) -> share, the projections as they first come.

    Where several stacks of layers have numbers, as towers of a model do, projections carry their names.
    """
    found = [(NUMBERED.match(tensor["layer"]), tensor) for tensor in tensors]
    stacks = {match.group(1) for match, _ in found if match}
    cells: defaultdict[tuple[str, str], float] = defaultdict(float)
    for match, tensor in found:
        row = label(tensor["projection"], 14, 6)
        if match and len(stacks) > 1:
            row = f"{label(match.group(1), 6, 12)}: {row}"
        cells[row, match.group(2) if match else OUTSIDE] += tensor["share"]
    return dict(cells)


def _colour(limit: float) -> alt.Color:
    edges = [limit * (2 * i - COUNT) / COUNT for i in range(1, COUNT)]
    steps = alt.Scale(type="threshold", domain=edges, range=list(DIVERGING))
    return alt.Color("share:Q", scale=steps, legend=None)


def _map(
    cells: Sequence[dict[str, Any]], layers: Sequence[str], rows: Sequence[str], limit: float
) -> Chart:
    across = min(CELL, (WIDTH - NAMES - 24) / len(layers))
    every = -(-26 // round(across)) if across < 26 else 1
    x = alt.X(
        "layer:O",
        title="layer",
        axis=alt.Axis(labelAngle=0, values=list(layers[::every]), labelOverlap="greedy", domain=False),
        scale=alt.Scale(domain=list(layers), paddingInner=0, paddingOuter=0),
    )
    names = alt.Axis(labelLimit=NAMES - 8, minExtent=NAMES, maxExtent=NAMES, domain=False, ticks=False)
    whole = alt.Scale(domain=list(rows), paddingInner=0, paddingOuter=0)
    y = alt.Y("projection:N", title=None, axis=names, scale=whole)
    map_ = alt.Chart(inline(cells)).mark_rect(stroke=BY_NAME["rule"], strokeWidth=0.5)
    layered = [map_.encode(x=x, y=y, color=_colour(limit))]
    if across >= SIGNED:  # the sign of what is not pale, for those who see the colours alike
        signs = [
            {
                **cell,
                "sign": "+" if cell["share"] > 0 else "\N{MINUS SIGN}",
                "strong": share > 7 / COUNT,
            }
            for cell in cells
            if (share := abs(cell["share"]) / limit) > 3 / COUNT
        ]
        page, ink = alt.value(BY_NAME["page"]), alt.value(BY_NAME["ink"])
        layered.append(
            alt.Chart(inline(signs))
            .mark_text(baseline="middle")
            .encode(x=x, y=y, text="sign:N", color=alt.condition(alt.datum.strong, page, ink))
        )
    return alt.layer(*layered).properties(width=across * len(layers), height=HEIGHT * len(rows))


def _key(limit: float, axis: Scaled) -> Chart:
    """The colours' steps along an axis of shares."""
    width = 2 * limit / COUNT
    steps = [{"share": (i - COUNT // 2) * width} for i in range(COUNT)]
    edges = [{**s, "low": s["share"] - width / 2, "high": s["share"] + width / 2} for s in steps]
    x = alt.X(
        "low:Q",
        title=None,
        scale=alt.Scale(domain=[-limit, limit], nice=False),
        axis=alt.Axis(
            values=[edges[i]["high"] for i in (0, 3, 6, 9)],
            labelExpr=axis.labels.replace(".6", ".2"),
            grid=False,
            domain=False,
        ),
    )
    bars = alt.Chart(inline(edges)).mark_rect(stroke=BY_NAME["rule"], strokeWidth=0.5)
    names = alt.Axis(minExtent=NAMES, maxExtent=NAMES, domain=False, ticks=False)
    y = alt.Y("key:N", title=None, axis=names)
    return (
        bars.transform_calculate(key="'share'")
        .encode(x=x, x2="high:Q", y=y, color=_colour(limit))
        .properties(width=WIDTH - NAMES - 24, height=14)
    )
