"""The responses of U and E as text, every token coloured by its share."""

from typing import NamedTuple

from markupsafe import Markup

from ...results.saved import SavedRun
from ..document import ENVIRONMENT, asset, data_block
from . import colours
from .batches import responses_of
from .view import section

__all__ = ["Responses", "responses"]


class Responses(NamedTuple):
    """What the responses add to a page."""

    html: Markup
    """Their sections, readable without a script; with the data that the script needs."""
    styles: str
    script: str


def responses(run: SavedRun) -> Responses:
    """Of U by share, of E by where the entropy changes; a sentence where the run has no shares."""
    sections = [section(run, responses_of(run, name)) for name in ("U", "E")]
    data = {one.name: one.data for one in sections if one.articles}
    html = ENVIRONMENT.get_template("responses.html.j2").render(
        sections=sections, data=data_block("responses-data", data) if data else ""
    )
    script = asset("responses.js") if data else ""
    return Responses(Markup(html), colours.styles() + asset("responses.css"), script)
