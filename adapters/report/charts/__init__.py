"""The figures of a run, in the order of the report: from what it wrote to a grammar of charts."""

from ...results.saved import SavedRun
from ..figure import Figure
from .batches import lengths, rewards
from .concentration import concentration
from .evaluation import evaluation
from .frontier import frontier
from .modules import modules
from .momentum import momentum
from .observables import observables
from .parts import parts
from .prompts import prompts
from .proxies import proxies
from .sweep import sweep

CHARTS = (
    sweep,
    parts,
    modules,
    prompts,
    concentration,
    momentum,
    proxies,
    frontier,
    observables,
    lengths,
    rewards,
    evaluation,
)


def figures(run: SavedRun) -> dict[str, Figure]:
    """Every figure that the run has the numbers for, by name."""
    found = (chart(run) for chart in CHARTS)
    return {figure.name: figure for figure in found if figure is not None}
