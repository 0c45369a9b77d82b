"""What a figure holds and what is drawn of it."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

from funcprobe.adapters.report.figure import Figure

SVG = "{http://www.w3.org/2000/svg}"


def rows(chart: dict[str, Any], *columns: str, part: Any = None) -> list[dict[str, Any]]:
    """Every row of data in a chart, or a part of it, that has these columns, each once."""
    names = dict.fromkeys(_names(chart if part is None else part))
    found = [row for name in names for row in chart["datasets"][name]]
    found = [row for row in found if set(columns) <= row.keys()]
    return [row for i, row in enumerate(found) if row not in found[:i]]


def _names(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        data = part.get("data")
        if isinstance(data, dict):
            yield data["name"]
        for each in part.values():
            yield from _names(each)
    elif isinstance(part, list):
        for each in part:
            yield from _names(each)


def texts(svg: str) -> list[str]:
    """Everything that is written in a chart, in the order of the file."""
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter(f"{SVG}text")]


def bars(figure: Figure) -> dict[str, dict[str, Any]]:
    """Name -> row of a figure of bars of shares."""
    found = {row["name"]: row for row in rows(figure.chart, "name", "share")}
    assert found
    return found


# Colours

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SIGHT = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = (0.95047, 1.0, 1.08883)


def _linear(colour: str) -> list[float]:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]


def _times(matrix: Any, vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def contrast(a: str, b: str) -> float:
    """Of WCAG 2, from 1 to 21."""
    low, high = sorted(_times(XYZ, _linear(colour))[1] for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def distance(a: str, b: str, sight: str) -> float:
    """Delta E of 1976 as it is seen; 2.3 is just noticeable."""

    def lab(colour: str) -> tuple[float, float, float]:
        seen = [min(max(x, 0.0), 1.0) for x in _times(SIGHT[sight], _linear(colour))]
        scaled = (x / w for x, w in zip(_times(XYZ, seen), WHITE, strict=True))
        x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in scaled)
        return 116 * y - 16, 500 * (x - y), 200 * (y - z)

    return math.dist(lab(a), lab(b))
