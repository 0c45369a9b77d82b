"""report.html: a run as one page."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup

from ..results.saved import SavedRun
from .causes import causes
from .charts import figures
from .curve import curve
from .document import ENVIRONMENT, asset, document
from .figure import Figure
from .headline import headline
from .render import inline_svg
from .responses import responses
from .rules import comparing, rules
from .theme import css_variables
from .trust import trust

# Where each figure stands; one of another name stands with the causes.
PLACES = {
    "sweep": "sweep",
    "observables": "observables",
    "parts": "parts",
    "modules": "modules",
    "prompts": "prompts",
    "concentration": "prompts",
    "evaluation": "evaluation",
    "momentum": "momentum",
    "proxies": "proxies",
    "frontier": "rules",
    "lengths": "sampling",
    "rewards": "sampling",
}

NARROW = 480  # pixels: the width of a figure that a telephone shows whole


class Drawn(NamedTuple):
    """A figure with its SVG."""

    figure: Figure
    svg: Markup
    wide: bool
    """Whether it would be too small in the width of a telephone, and scrolls there."""


def report_html(run: SavedRun, charts: dict[str, Figure] | None = None) -> str:
    """The page, self-contained; `charts`: its figures, if they are made already."""
    charts = figures(run) if charts is None else charts
    text = responses(run)
    body = ENVIRONMENT.get_template("report.html.j2").render(
        name=run.folder.name,
        manifest=run.manifest,
        results=run.results,
        config=run.config,
        log=run.log,
        about=_about(run),
        headline=headline(run),
        curve=curve(run),
        causes=causes(run),
        rules=rules(run),
        trust=trust(run),
        whatif=run.whatif,
        whatif_left_out=run.whatif_left_out,
        comparing=comparing(run),
        figures=_placed(charts.values()),
        responses=text.html,
    )
    styles = css_variables() + asset("page.css") + text.styles
    return document(f"{run.folder.name} – funcprobe", Markup(body), styles=styles, script=text.script)


def _placed(charts: Iterable[Figure]) -> dict[str, list[Drawn]]:
    placed: dict[str, list[Drawn]] = {place: [] for place in PLACES.values()}
    for figure in charts:
        placed[PLACES.get(figure.name, "parts")].append(drawn(figure))
    return placed


def drawn(figure: Figure) -> Drawn:
    """The figure in the page's colours."""
    svg = inline_svg(figure)
    width = re.match(r'<svg [^>]*?\bwidth="([0-9.]+)"', svg)
    return Drawn(figure, Markup(svg), width is not None and float(width[1]) > NARROW)


def _about(run: SavedRun) -> list[tuple[str, str]]:
    """Which policy, which prompts; as config.toml has them."""
    config = run.settings()
    found = (
        ("Checkpoint", config.get("policy", {}).get("checkpoint")),
        ("Prompts", config.get("prompts", {}).get("source")),
    )
    return [(name, value) for name, value in found if isinstance(value, str)]
