"""How the responses came out: their lengths and rewards, in U and in E."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np
from numpy.typing import NDArray

from ...results.saved import SavedRun
from ..figure import WIDTH, Figure
from ..theme import BY_NAME
from .pieces import Chart, grammar, heading, inline, number, padded, scaled

BINS = 40  # at most
FEW = 12  # different values, of which each has a bar of its own
SIDES = 62  # pixels that are not the plot
ENDED, CUT_OFF, UNKNOWN = "ended", "cut off", "not known"
ENDS = {"stop": ENDED, "length": CUT_OFF, None: UNKNOWN}
FILLS = {ENDED: ("rises-2", "rises"), CUT_OFF: ("falls", "falls"), UNKNOWN: ("rule", "muted")}
FILES = {"U": "update", "E": "eval"}


def lengths(run: SavedRun) -> Figure | None:
    """Response tokens in U and E, those that were cut off apart."""
    found = {}
    for batch, file in FILES.items():
        table = run.rollouts(file)
        tokens = np.array([len(ids) for ids in table["response_ids"].to_pylist()])
        ends = np.array([ENDS[end] for end in table["finish_reason"].to_pylist()])
        found[batch] = tokens, ends
    bars = bars_of(np.concatenate([tokens for tokens, _ in found.values()]), whole=True)
    rows = [
        row
        for batch, (tokens, ends) in found.items()
        for row in _counted(batch, bars, {end: tokens[ends == end] for end in FILLS})
    ]
    kinds = [kind for kind in FILLS if any(row["kind"] == kind for row in rows)]
    said = [
        f"{batch}: {len(tokens)} responses, mean {number(float(tokens.mean()))}, largest "
        f"{tokens.max()}, {int((ends == CUT_OFF).sum())} cut off"
        for batch, (tokens, ends) in found.items()
    ]
    return Figure(
        "lengths",
        "Lengths of the responses",
        f"Response tokens, the first end of sequence included. {'; '.join(said)}.",
        f"{'; '.join(said)}.",
        grammar(_panels(rows, list(found), bars, "tokens of a response", kinds)),
    )


def rewards(run: SavedRun) -> Figure | None:
    """Rewards in U, and in E where they are known."""
    found = {}
    for batch, file in FILES.items():
        column = run.rollouts(file)["reward"].to_numpy(zero_copy_only=False).astype(float)
        if len(known := column[np.isfinite(column)]):
            found[batch] = known
    if not found:
        return None
    bars = bars_of(np.concatenate(list(found.values())), whole=False)
    rows = [row for batch, values in found.items() for row in _counted(batch, bars, {ENDED: values})]
    said = [
        f"{batch}: {len(values)} responses, mean {number(float(values.mean()))}, from "
        f"{number(float(values.min()))} to {number(float(values.max()))}"
        for batch, values in found.items()
    ]
    return Figure(
        "rewards",
        "Rewards of the responses",
        f"{'; '.join(said)}.",
        f"{'; '.join(said)}.",
        grammar(_panels(rows, list(found), bars, "reward", [])),
    )


class Bars(NamedTuple):
    """Where the bars of a histogram stand."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    edges: NDArray[np.float64]
    """What falls between two of them is in one bar; one more than there are bars."""
    values: tuple[float, ...]
    """Of the values, where there are so few that each has a bar; else empty."""


def bars_of(values: NDArray[Any], *, whole: bool) -> Bars:
    """A bar a value where there are few, else of equal width; of whole numbers, in whole widths."""
    different = np.unique(values).astype(float)
    if len(different) <= FEW:
        gap = float(np.diff(different).min()) if len(different) > 1 else 1.0
        between = (different[1:] + different[:-1]) / 2
        edges = np.concatenate([[-np.inf], between, [np.inf]])
        return Bars(different - 0.4 * gap, different + 0.4 * gap, edges, tuple(different.tolist()))
    if whole:
        low, high = different[0] - 0.5, different[-1] + 0.5
        width = max(1, int(np.ceil((high - low) / BINS)))
        edges = np.arange(low, high + width, width)
    else:
        edges = np.linspace(different[0], different[-1], BINS + 1)
    return Bars(edges[:-1], edges[1:], edges, ())


def _counted(batch: str, bars: Bars, values: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """A row for every part of a bar, by kind, each on top of the one before."""
    rows = []
    base = np.zeros(len(bars.low), dtype=int)
    for kind, each in values.items():
        counts, _ = np.histogram(each, bars.edges)
        for i in counts.nonzero()[0]:
            place = {"low": float(bars.low[i]), "high": float(bars.high[i])}
            height = {"from": int(base[i]), "to": int(base[i] + counts[i])}
            rows.append({"batch": batch, "kind": kind, **place, **height, "responses": int(counts[i])})
        base += counts
    return rows


def _panels(
    rows: Sequence[dict[str, Any]],
    batches: Sequence[str],
    bars: Bars,
    title: str,
    kinds: Sequence[str],
) -> Chart:
    order = list(FILLS)
    fills, edges = (
        alt.Scale(domain=order, range=[BY_NAME[FILLS[kind][i]] for kind in order]) for i in (0, 1)
    )
    legend = alt.Legend(title=None, orient="top", symbolType="square", values=list(kinds))
    shown = legend if set(kinds) - {ENDED} else None
    room = 0.06 if len(bars.low) > 3 else 1.0 / len(bars.low)  # a few bars are no wider for it
    panels = []
    for batch in batches:
        last = batch == batches[-1]
        ticks: dict[str, Any] = {"values": list(bars.values)} if bars.values else {"tickCount": 8}
        x = alt.X(
            "low:Q",
            title=title if last else None,
            scale=alt.Scale(domain=padded([*bars.low, *bars.high], zero=False, part=room), nice=False),
            axis=alt.Axis(
                grid=False,
                labels=last,
                labelOverlap="greedy",
                labelExpr=scaled(bars.high).labels,
                **ticks,
            ),
        )
        counts = alt.Axis(tickCount=4, minExtent=36, maxExtent=36, format="d", tickMinStep=1)
        panels.append(
            alt.Chart(inline(row for row in rows if row["batch"] == batch))
            .mark_rect(strokeWidth=1)
            .encode(
                x=x,
                x2="high:Q",
                y=alt.Y("from:Q", title=None, axis=counts),
                y2="to:Q",
                fill=alt.Fill("kind:N", scale=fills, legend=shown),
                stroke=alt.Stroke("kind:N", scale=edges, legend=shown),
            )
            .properties(width=WIDTH - SIDES, height=110, title=heading(f"{batch}, responses"))
        )
    return alt.vconcat(*panels, spacing=8).resolve_scale(y="independent")
