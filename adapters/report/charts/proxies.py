"""The token scores of papers against the exact shares."""

from typing import Any, NamedTuple

import altair as alt
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from ...results.proxy_table import ProxyTable, proxy_table
from ...results.saved import SavedRun
from ..figure import Figure
from ..theme import BY_NAME, TEXT
from .pieces import PERCENT, Chart, grammar, inline, number

CELLS = 10  # of either axis of ranks
COLUMNS = 3
PLOT = 112  # pixels of a panel, of which the first of a row has the labels
LABELS = 48
SIDE = PLOT / CELLS - 1  # pixels of the square of the fullest cell


def proxies(run: SavedRun) -> Figure | None:
    """Ranks of every score against ranks of the shares of U's tokens, counted in cells."""
    table = proxy_table(run)
    if table is None:
        return None
    share = table.tokens["share"].to_numpy()
    across = _places(share)
    panels = [
        _panel(
            [name, f"rho = {'undefined' if rho is None else number(rho, 2)}"],
            counted(share, across, table.tokens[name].to_numpy()),
            first=i % COLUMNS == 0,
            last=i + COLUMNS >= len(table.spearman),
        )
        for i, (name, rho) in enumerate(table.spearman.items())
    ]
    scores = [name for name in table.spearman if name != "marginal"]
    return Figure(
        "proxies",
        "Scores of papers against the exact shares",
        f"Ranks of the {len(share)} tokens of U by their exact share (across) and by a score (up), "
        "lowest first; the area of a square is the number of tokens in it, of "
        f"{CELLS} by {CELLS} cells. Along the rising diagonal a score orders the tokens as the shares "
        "do. Dashed: where either changes its sign. rho: Spearman's rank correlation. "
        f"{len(scores)} scores that papers derive for a tabular softmax, and this run's marginals.",
        _description(table),
        grammar(alt.concat(*panels, columns=COLUMNS, spacing=12).resolve_scale(size="independent")),
    )


class Counted(NamedTuple):
    """Tokens by the ranks of their shares and scores."""

    cells: NDArray[np.int64]
    """[across, up], by share and by score."""
    negative: tuple[float, float]
    """Parts of the shares and of the scores below 0."""


def counted(
    share: NDArray[np.float64], across: NDArray[np.int64], score: NDArray[np.float64]
) -> Counted:
    """Tokens in every cell of ranks; `across`: the shares' cells, which are the same for all scores."""
    cells = np.zeros((CELLS, CELLS), dtype=np.int64)
    np.add.at(cells, (across, _places(score)), 1)
    return Counted(cells, (float((share < 0).mean()), float((score < 0).mean())))


def _places(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The cell of each by its rank; equal values share their mean rank, and so a cell."""
    rank = (rankdata(values) - 0.5) / len(values)
    places: NDArray[np.int64] = np.minimum((rank * CELLS).astype(np.int64), CELLS - 1)
    return places


def _panel(title: list[str], found: Counted, *, first: bool, last: bool) -> Chart:
    cells, (left, below) = found
    rows = [
        {"share": (i + 0.5) / CELLS, "score": (j + 0.5) / CELLS, "tokens": int(cells[i, j])}
        for i, j in zip(*cells.nonzero(), strict=True)
    ]
    unit = alt.Scale(domain=[0, 1], nice=False)
    axis: dict[str, Any] = {"values": [0, 0.5, 1], "grid": False, "labelExpr": PERCENT}
    across = alt.Axis(labels=last, labelFlush=True, **axis)
    up = alt.Axis(labels=first, minExtent=LABELS if first else 0, **axis)
    zero = alt.Chart(inline([{"left": left, "below": below}]))
    dashed: dict[str, Any] = {"strokeDash": [3, 3], "color": BY_NAME["muted"]}
    size = alt.Scale(domain=[0, int(cells.max())], range=[0, SIDE**2])
    squares = alt.Chart(inline(rows)).mark_square(opacity=1, color=BY_NAME["predicted"])
    return (
        alt.layer(
            zero.mark_rule(**dashed).encode(x=alt.X("left:Q", scale=unit)),
            zero.mark_rule(**dashed).encode(y=alt.Y("below:Q", scale=unit)),
            squares.encode(
                x=alt.X(
                    "share:Q", scale=unit, axis=across, title="rank of the share" if last else None
                ),
                y=alt.Y("score:Q", scale=unit, axis=up, title=None),
                size=alt.Size("tokens:Q", scale=size, legend=None),
            ),
        )
        .resolve_scale(x="shared", y="shared")
        .properties(
            width=PLOT,
            height=PLOT,
            title=alt.TitleParams(title, fontSize=TEXT, anchor="start", frame="group", offset=6),
            view=alt.ViewBackground(stroke=BY_NAME["rule"]),
        )
    )


def _description(table: ProxyTable) -> str:
    words = []
    for name, rho in table.spearman.items():
        same = table.same_sign[name]
        signs = "" if same is None else f", the same sign for {100 * same:.0f} % of the tokens"
        correlation = "undefined" if rho is None else number(rho, 2)
        words.append(f"{name}: rank correlation {correlation}{signs}")
    return "; ".join(words) + "."
