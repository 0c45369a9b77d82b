"""A figure as SVG inside a page, and as files: SVG, PNG."""

import re
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import vl_convert

from .figure import Figure
from .theme import COLOURS, config

SCALE = 2.0  # pixels of a PNG for one of the chart


def inline_svg(figure: Figure) -> str:
    """The chart as an <svg> element in the page's colours, of the width of its place; no network.

    Its text is escaped by the renderer, its colours are custom properties (`theme.css_variables`).
    """
    svg = _svg(figure)
    for colour in COLOURS:
        svg = svg.replace(f'"{colour.placeholder}"', f'"var(--{colour.name})"')
    return _labelled(svg, figure)


def write_figures(figures: Iterable[Figure], folder: Path) -> None:
    """NAME.svg, NAME.png and NAME.txt, the caption, of every figure, on white."""
    for figure in figures:
        svg = _labelled(_light(_svg(figure)), figure)
        (folder / f"{figure.name}.svg").write_text(svg, encoding="utf-8")
        png = vl_convert.svg_to_png(_light(_svg(figure)), scale=SCALE)
        (folder / f"{figure.name}.png").write_bytes(png)
        (folder / f"{figure.name}.txt").write_text(f"{figure.title}\n\n{figure.caption}\n", "utf-8")


def _svg(figure: Figure) -> str:
    svg: str = vl_convert.vegalite_to_svg({**figure.chart, "config": config()})
    return svg


def _light(svg: str) -> str:
    for colour in COLOURS:
        svg = svg.replace(f'"{colour.placeholder}"', f'"{colour.light}"')
    return svg.replace('fill="transparent"', 'fill="white"', 1)


def _labelled(svg: str, figure: Figure) -> str:
    """With a title and a description for screen readers, which read the chart as one image."""
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (role|aria-label)="[^"]*"', "", opening)
    title = f"<title>{escape(figure.title)}</title><desc>{escape(figure.description)}</desc>"
    return f'{opening} role="img" aria-label={quoteattr(figure.title)}>{title}{rest}'
