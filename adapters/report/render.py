"""A figure as SVG inside a page, and as files: SVG, PNG."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import vl_convert

from .figure import Figure
from .theme import COLOURS, config

SCALE = 2.0  # pixels of a PNG for one of the chart
LONGEST = 300  # characters of a text in a chart, beyond which no axis shows it
SVG = "http://www.w3.org/2000/svg"
# What XML 1.0 has no place for, escaped or not.
NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
REFERENCE = re.compile(r"url\(#([^)]+)\)")


def inline_svg(figure: Figure) -> str:
    """The chart as an <svg> element in the page's colours, of the width of its place; no network.

    Its text is escaped by the renderer, its colours are custom properties (`theme.css_variables`), its
    ids begin with the figure's name.
    """
    return _drawn(figure, {colour.placeholder: f"var(--{colour.name})" for colour in COLOURS})


def write_figures(figures: Iterable[Figure], folder: Path) -> None:
    """NAME.svg, NAME.png and NAME.txt, the caption, of every figure, on white."""
    light = {colour.placeholder: colour.light for colour in COLOURS}
    for figure in figures:
        svg = _drawn(figure, light)
        (folder / f"{figure.name}.svg").write_text(svg, encoding="utf-8")
        (folder / f"{figure.name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=SCALE))
        (folder / f"{figure.name}.txt").write_text(f"{figure.title}\n\n{figure.caption}\n", "utf-8")


def _drawn(figure: Figure, colours: Mapping[str, str]) -> str:
    """In these colours; for screen readers one image, with a title and a description."""
    root = ET.fromstring(_svg(json.dumps(_written({**figure.chart, "config": config()}))))
    ids = (element.get("id") for element in root.iter() if "id" in element.attrib)
    names = {each: f"{figure.name}-{number}" for number, each in enumerate(ids)}  # else by the process
    for element in root.iter():
        _settle(element, names, colours)
    title, description = (
        _element(kind, f"{figure.name}-{kind}", text)
        for kind, text in (("title", figure.title), ("desc", figure.description))
    )
    root.insert(0, title)
    root.insert(1, description)
    root.set("xmlns", SVG)
    root.set("role", "img")
    root.set("aria-labelledby", f"{title.get('id')} {description.get('id')}")
    return ET.tostring(root, encoding="unicode")


@lru_cache(maxsize=64)  # once for the page and the files
def _svg(chart: str) -> str:
    svg: str = vl_convert.vegalite_to_svg(chart)
    return svg.replace(f' xmlns="{SVG}"', "", 1)  # or every name has it


def _written(part: Any) -> Any:
    """Without what XML cannot hold and in bounds: vl-convert 1.9 ends the process otherwise."""
    if isinstance(part, str):
        return NO_XML.sub("\ufffd", part[:LONGEST])
    if isinstance(part, dict):
        return {_written(key): _written(each) for key, each in part.items()}
    return [_written(each) for each in part] if isinstance(part, list) else part


def _settle(element: ET.Element, names: Mapping[str | None, str], colours: Mapping[str, str]) -> None:
    for key, value in list(element.items()):
        if key == "role" or key.startswith("aria-"):
            del element.attrib[key]
        elif key in ("fill", "stroke", "stop-color") and value in colours:
            element.set(key, colours[value])
        elif key == "id":
            element.set(key, names[value])
        elif found := REFERENCE.fullmatch(value):
            element.set(key, f"url(#{names[found[1]]})")


def _element(kind: str, name: str, text: str) -> ET.Element:
    element = ET.Element(kind, id=name)
    element.text = NO_XML.sub("\ufffd", text)
    return element
