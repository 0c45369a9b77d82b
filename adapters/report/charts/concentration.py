"""How few tokens, responses and prompts hold most of the shares."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np
from numpy.typing import NDArray

from ...results.saved import SavedRun
from ..figure import WIDTH, Figure
from ..theme import BY_NAME
from .pieces import PERCENT, grammar, inline

POINTS = 200  # of a curve, at most
FEW = 0.05  # of all, whose part is said
KINDS = (
    ("tokens", "U", "tokens of U", "predicted", [1, 0]),
    ("sequences", "U", "responses of U", "measured", [7, 3]),
    ("prompts", "U", "prompts of U", "other", [2, 3]),
    ("tokens", "E", "tokens of E", "fourth", [7, 3, 2, 3]),
)


class Curve(NamedTuple):
    """The part of all |share| that the largest k of n hold."""

    name: str
    held: NDArray[np.float64]
    """[n + 1], of k = 0 to n."""

    @property
    def of(self) -> int:
        return len(self.held) - 1

    def few(self) -> tuple[int, float]:
        """5 % of all, at least one: how many, and the part they hold."""
        k = max(1, round(FEW * self.of))
        return k, float(self.held[k])


def concentration(run: SavedRun) -> Figure | None:
    """Curves of |share| over tokens, responses and prompts, the largest first."""
    found = {
        name: shares
        for table, batch, name, _, _ in KINDS
        if (shares := _shares(run, table, batch)) is not None and np.abs(shares).sum() > 0
    }
    curves = [
        (lorenz(name, found[name]), colour, dash) for *_, name, colour, dash in KINDS if name in found
    ]
    if not curves:
        return None
    rows: list[dict[str, Any]] = []
    for curve, _, _ in curves:
        for k in drawn(curve.of):
            rows.append({"of": curve.name, "items": k / curve.of, "held": float(curve.held[k])})
    said = []
    for curve, _, _ in curves:
        k, part = curve.few()
        said.append(f"{k} of {curve.of} {curve.name} hold {part:.0%}".replace("%", " %"))
    none = [
        f"{zeros} of {len(shares)} {name}"
        for name, shares in found.items()
        if (zeros := _zeros(shares))
    ]
    without = f" With a share of 0, and counted: {', '.join(none)}." if none else ""
    chart = alt.layer(
        alt.Chart(inline({"items": x, "held": x} for x in (0, 1)))
        .mark_line(color=BY_NAME["muted"], strokeWidth=1)
        .encode(x="items:Q", y="held:Q"),
        _lines(rows, [(curve.name, colour, dash) for curve, colour, dash in curves]),
    ).properties(width=WIDTH, height=300, autosize=alt.AutoSizeParams(type="fit", contains="padding"))
    return Figure(
        "concentration",
        "How few make the change",
        "The part of the sum of all absolute shares that the largest hold; on the straight line all "
        f"would be equal. The largest 5 %: {'; '.join(said)}. Absolute shares, as those of either sign "
        f"cancel in the sum; without intervals.{without}",
        f"{'; '.join(said)} of the sum of absolute shares.",
        grammar(chart),
    )


def _zeros(shares: NDArray[np.float64]) -> int:
    return int((shares == 0).sum())


def lorenz(name: str, shares: NDArray[np.float64]) -> Curve:
    """Sorted by absolute size, the largest first."""
    sizes = np.sort(np.abs(shares))[::-1]
    held = np.concatenate([[0.0], np.cumsum(sizes)])
    return Curve(name, held / held[-1])


def drawn(count: int) -> list[int]:
    """Of k = 0 to `count` at most POINTS, denser where k is small and the curve is steep."""
    if count < POINTS:
        return list(range(count + 1))
    half = POINTS // 2 - 1
    near = np.geomspace(1, count, half).round()
    even = np.linspace(0, count, half).round()
    return [int(k) for k in np.union1d(near, even)]


def _shares(run: SavedRun, name: str, batch: str) -> NDArray[np.float64] | None:
    table = run.table("sequences" if name == "prompts" else name)
    if table is None:
        return None
    of_batch = table["batch"].to_numpy(zero_copy_only=False) == batch
    shares: NDArray[np.float64] = table["share"].to_numpy(zero_copy_only=False)[of_batch].astype(float)
    shares = shares[~np.isnan(shares)]
    if name == "prompts" and len(shares) == of_batch.sum():
        prompt = np.unique(table["prompt_index"].to_numpy()[of_batch], return_inverse=True)[1]
        return np.bincount(prompt, weights=shares).astype(float)
    return shares if len(shares) else None


def _lines(rows: Sequence[dict[str, Any]], kinds: Sequence[tuple[str, str, list[int]]]) -> alt.Chart:
    names = [name for name, _, _ in kinds]
    legend = alt.Legend(
        title=None,
        orient="bottom-right",
        symbolType="stroke",
        symbolStrokeWidth=2.5,
        symbolSize=700,
        labelLimit=200,
        offset=12,
    )
    colours = alt.Scale(domain=names, range=[BY_NAME[colour] for _, colour, _ in kinds])
    dashes = alt.Scale(domain=names, range=[dash for _, _, dash in kinds])
    percent = alt.Axis(labelExpr=PERCENT, tickCount=5)
    unit = alt.Scale(domain=[0, 1], nice=False)
    chart: alt.Chart = (
        alt.Chart(inline(rows))
        .mark_line(strokeWidth=2.2)
        .encode(
            x=alt.X("items:Q", title="the largest, of all", axis=percent, scale=unit),
            y=alt.Y("held:Q", title="hold of the sum of |share|", axis=percent, scale=unit),
            color=alt.Color("of:N", scale=colours, legend=legend),
            strokeDash=alt.StrokeDash("of:N", scale=dashes, legend=legend),
        )
    )
    return chart
