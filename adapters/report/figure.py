"""A chart with the words that belong to it."""

from typing import Any, NamedTuple

WIDTH = 460
"""Pixels across any chart: on a telephone of 390 it is scaled to 358, its text of 13 px to 10."""


class Figure(NamedTuple):
    """A chart: its grammar (Vega-Lite), and what is said of it."""

    name: str
    """Of its files in figures/, as "sweep"; also the id of its place in a page."""
    title: str
    """What is asked, in a few words."""
    caption: str
    """What it shows, n, and what the interval covers; plain text."""
    description: str
    """For those who do not see it: what is to be seen, with the numbers that matter; plain text."""
    chart: dict[str, Any]
    """Vega-Lite, data inside, in the colours of `theme`, at most WIDTH wide."""
