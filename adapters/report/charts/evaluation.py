"""Where in E the entropy changes: by term, and by prompt."""

import altair as alt

from ...results.saved import SavedRun
from ..figure import Figure
from .pieces import amounts, grammar
from .shares import Bar, listed, share_bars

NAMES = 196  # pixels


def evaluation(run: SavedRun) -> Figure | None:
    """The three terms of the derivative, and the prompts of E of the largest shares."""
    section = run.results.attribution
    if section is None:
        return None
    terms = [
        Bar("distributions' own", section.direct.share, section.direct.interval),
        Bar("probability of the tokens", section.score.share, section.score.interval),
        Bar("control variate", section.control.share, section.control.interval),
        Bar("the whole", section.whole.share, section.whole.interval, sum=True),
    ]
    largest = sorted(section.E_prompts, key=lambda p: (p.total.share, p.prompt_index))
    prompts = [Bar(f"{p.prompt_index} {p.text}", p.total.share, p.total.interval) for p in largest]
    scale, counts = amounts(run), run.results.counts
    panels = [share_bars(terms, scale, "by term: change", names=NAMES)]
    if prompts:
        panels.append(share_bars(prompts, scale, "by prompt of E: change", names=NAMES))
    return Figure(
        "evaluation",
        "Where in E the entropy changes",
        f"Predicted change of the entropy, {scale.at}. Above, its terms: the entropy of the tokens' "
        "own distributions; tokens that become more or less probable, and with them the entropy after "
        f"them; the control variate of that. Below, the {len(prompts)} of {counts.E_prompts} prompts "
        "of E with the largest shares. Lines: 95 % intervals over the "
        f"{counts.E_sequences} responses of E, U given; a prompt that was drawn once has one "
        "as wide as its share.",
        f"Terms: {listed(terms, scale)} Prompts: {listed(prompts, scale)}",
        grammar(alt.vconcat(*panels).resolve_scale(y="independent", x="independent")),
    )
