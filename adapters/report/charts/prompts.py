"""Which prompts of U make this batch's part, sorted by their shares."""

from collections import defaultdict
from statistics import fmean
from typing import Any

from ...results.prompt_texts import shortened, without_common
from ...results.saved import SavedRun
from ..figure import Figure
from .pieces import amounts, grammar
from .shares import Bar, listed, share_bars

NAMES = 196  # pixels
EACH = 15  # prompts of either sign that are shown


def prompts(run: SavedRun) -> Figure | None:
    """The prompts of the largest shares of either sign, and the sum of the others."""
    section = run.results.attribution
    rows = _of_U(run)
    if section is None or not rows:
        return None
    texts = _texts(run, rows)
    influence = run.results.influence
    known = {p.prompt_index: p.share.interval for p in influence.prompts} if influence else {}
    shares: defaultdict[int, float] = defaultdict(float)
    rewards: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        shares[row["prompt_index"]] += row["share"]
        if row["reward"] is not None:
            rewards[row["prompt_index"]].append(row["reward"])
    order = sorted(shares, key=lambda index: (shares[index], index))

    def bar(index: int) -> Bar:
        reward = f" ({fmean(rewards[index]):.2g})" if rewards[index] else ""
        return Bar(f"{index}{reward} {texts[index]}", shares[index], known.get(index))

    falling = [index for index in order if shares[index] < 0][:EACH]
    rising = [index for index in order if shares[index] >= 0][-EACH:]
    others = [index for index in order if index not in {*falling, *rising}]
    middle = [Bar(f"the other {len(others)}", sum(shares[i] for i in others), sum=True)]
    bars = [*map(bar, falling), *(middle if others else []), *map(bar, rising)]
    scale, counts = amounts(run), run.results.counts
    with_interval = sum(1 for each in bars if each.interval)
    lines = (
        f"Lines: 95 % intervals over the {counts.E_sequences} responses of E, of the {with_interval} "
        "prompts that have a pass over E of their own (attribution.influence)."
        if with_interval
        else "Without intervals, as each takes a pass over E of its own (attribution.influence)."
    )
    return Figure(
        "prompts",
        "Which prompts of U make this batch's part",
        f"Shares of the {len(order)} prompts of U ({counts.U_sequences} responses) in the predicted "
        f"change of the entropy, {scale.at}, sorted. In brackets the mean reward of a prompt's "
        f"responses. {lines}",
        listed(bars, scale),
        grammar(share_bars(bars, scale, "change of the entropy", names=NAMES)),
    )


def _of_U(run: SavedRun) -> list[dict[str, Any]]:
    table = run.table("sequences")
    if table is None:
        return []
    columns = ["batch", "prompt_index", "prompt", "reward", "share"]
    return [row for row in table.select(columns).to_pylist() if row["batch"] == "U"]


def _texts(run: SavedRun, rows: list[dict[str, Any]]) -> dict[int, str]:
    """As results.json has them, and for the others as it would."""
    full = {row["prompt_index"]: row["prompt"] or "" for row in rows}
    found = {index: shortened(text) for index, text in without_common(full).items()}
    section = run.results.attribution
    return found | {p.prompt_index: p.text for p in (section.U_prompts if section else ())}
