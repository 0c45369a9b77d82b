"""Which prompts of U make this batch's part, sorted by their shares."""

import math
from typing import Any

from ...results.prompt_table import prompt_table
from ...results.prompt_texts import shortened
from ...results.quantity import Interval
from ...results.saved import SavedRun
from ..figure import Figure
from .pieces import amounts, grammar
from .shares import Bar, listed, share_bars

NAMES = 196  # pixels
EACH = 15  # prompts of either sign that are shown


def prompts(run: SavedRun) -> Figure | None:
    """The prompts of the largest shares of either sign, and the sum of the others."""
    table = prompt_table(run, "U")
    if table is None or run.results.attribution is None:
        return None
    rows = [row for row in table.to_pylist() if row["share"] is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: (row["share"], row["prompt_index"]))
    named = {p.prompt_index: p.text for p in run.results.attribution.U_prompts}
    falling = [row for row in rows if row["share"] < 0][:EACH]
    rising = [row for row in rows if row["share"] >= 0][-EACH:]
    rest = rows[len(falling) : len(rows) - len(rising)]
    between = Bar(f"the other {len(rest)}", math.fsum(row["share"] for row in rest), sum=True)
    bars = [
        *(_bar(row, named) for row in falling),
        *([between] if rest else []),
        *(_bar(row, named) for row in rising),
    ]
    scale, counts = amounts(run), run.results.counts
    with_interval = sum(1 for bar in bars if bar.interval)
    lines = (
        f"Lines: 95 % intervals over the {counts.E_sequences} responses of E, of the {with_interval} "
        "prompts that have a pass over E of their own (attribution.influence)."
        if with_interval
        else "Without intervals, as each takes a pass over E of its own (attribution.influence)."
    )
    return Figure(
        "prompts",
        "Which prompts of U make this batch's part",
        f"Shares of the {len(rows)} prompts of U ({counts.U_sequences} responses) in the predicted "
        f"change of the entropy, {scale.at}, sorted. In brackets the mean reward of a prompt's "
        f"responses. {lines}",
        listed(bars, scale),
        grammar(share_bars(bars, scale, "change of the entropy", names=NAMES)),
    )


def _bar(row: dict[str, Any], named: dict[int, str]) -> Bar:
    """Its text as results.json has it, or as it would."""
    index, reward, low, high = (
        row[key] for key in ("prompt_index", "mean_reward", "share_low", "share_high")
    )
    text = named.get(index) or shortened(row["text"] or "")
    rewarded = "" if reward is None else f" ({reward:.2g})"
    interval = None if low is None else Interval(low=low, high=high)
    return Bar(f"{index}{rewarded} {text}", row["share"], interval)
