"""Which part of the step makes the predicted change: momentum, weight decay, this batch."""

from ...results.saved import SavedRun
from ..figure import Figure
from .pieces import amounts, grammar
from .shares import Bar, listed, share_bars

NAMES = 104  # pixels


def parts(run: SavedRun) -> Figure | None:
    """Momentum, weight decay, this batch and the whole, with intervals over E."""
    section = run.results.attribution
    if section is None:
        return None
    bars = [
        Bar("momentum", section.momentum.share, section.momentum.interval),
        Bar("weight decay", section.decay.share, section.decay.interval),
        Bar("this batch", section.update.share, section.update.interval),
        Bar("the whole", section.whole.share, section.whole.interval, sum=True),
    ]
    scale, counts = amounts(run), run.results.counts
    return Figure(
        "parts",
        "Which part of the step makes the predicted change",
        f"Predicted change of the entropy, {scale.at}, by the parts of the step, which sum to the "
        f"whole. Lines: 95 % intervals over the {counts.E_sequences} responses of E, U given.",
        listed(bars, scale),
        grammar(share_bars(bars, scale, "change of the entropy", names=NAMES)),
    )
