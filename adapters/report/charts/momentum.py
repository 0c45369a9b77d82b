"""Whose momentum: the share of every recorded step before this one."""

from ...results.saved import SavedRun
from ..figure import Figure
from .pieces import amounts, grammar
from .shares import Bar, listed, share_bars

NAMES = 150  # pixels
MOST = 24  # steps with a bar of their own


def momentum(run: SavedRun) -> Figure | None:
    """By steps ago, the older together; None where no gradients are recorded."""
    section = run.results.momentum
    if section is None or not section.by_step:
        return None
    shown, rest = section.by_step[:MOST], section.by_step[MOST:]
    bars = [
        Bar(f"{step.steps_ago} step{'s' if step.steps_ago > 1 else ''} ago", step.share)
        for step in shown
    ]
    if rest:
        ago = f"{rest[0].steps_ago} to {rest[-1].steps_ago} steps ago"
        bars.append(Bar(ago, sum(step.share for step in rest), sum=True))
    if section.before is not None:
        bars.append(Bar("rounding" if section.all_steps else "before that", section.before, sum=True))
    bars.append(Bar("momentum", section.momentum, sum=True))
    scale = amounts(run)
    return Figure(
        "momentum",
        "Whose momentum moves the entropy",
        f"Part of momentum in the predicted change of the entropy, {scale.at}, by the gradients of the "
        f"{len(section.by_step)} recorded steps before this one; the bars sum to the last. "
        "Without intervals.",
        listed(bars, scale),
        grammar(share_bars(bars, scale, "change of the entropy", names=NAMES)),
    )
