"""Levels of a diverging scale, whose zero is the page's own colour."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..theme import COLOURS

Floats = npt.NDArray[np.float64]

LEVELS = 10  # of either sign
REACHED = (
    0.98  # quantile of |share| with the full colour, so that a few outliers leave the rest coloured
)
FALLS, RISES = "f-", "r-"  # elements <f-1> to <f-10>, <r-1> to <r-10>: shorter than classes

# Orange and blue, which colour-blind readers tell apart. The page's ink has a contrast of more than
# 4.5 on the full colours (tests/report/test_responses_colours.py).
FULL = {"light": {FALLS: "#f0954a", RISES: "#62b3ea"}, "dark": {FALLS: "#9a4300", RISES: "#0a629f"}}


class Scale(NamedTuple):
    """Level = round(LEVELS x |share| / full), at most LEVELS; 0 has no colour."""

    full: float
    """|share| from which the colour is the full one; 0: every share is 0."""
    beyond: float
    """Fraction of the tokens whose |share| is larger."""


def scale(shares: Floats) -> Scale:
    """One for all tokens, linear up to the 98 % quantile of |share|, or the largest where that is 0."""
    size = np.abs(shares[np.isfinite(shares)])
    if not size.any():
        return Scale(0.0, 0.0)
    full = float(np.quantile(size, REACHED, method="higher")) or float(size.max())
    return Scale(full, float((size > full).mean()))


def levels(shares: Floats, scale: Scale) -> list[str]:
    """The element of each token; "" for one whose share is less than half a level, or missing."""
    if not scale.full:
        return [""] * len(shares)
    level = np.floor(np.minimum(LEVELS * np.abs(np.nan_to_num(shares)) / scale.full, LEVELS) + 0.5)
    signed = np.where(shares < 0, -level, level).astype(np.int64)
    return [NAMES[LEVELS + i] for i in signed.tolist()]


NAMES = (
    *(f"{FALLS}{level}" for level in range(LEVELS, 0, -1)),
    "",
    *(f"{RISES}{level}" for level in range(1, LEVELS + 1)),
)
"""From the strongest fall to the strongest rise."""


def palette(mode: str) -> dict[str, str]:
    """Element -> background, for mode "light" or "dark": even steps in Oklab from the page's colour."""
    page = next(getattr(colour, mode) for colour in COLOURS if colour.name == "page")
    return {
        f"{sign}{level}": _between(page, FULL[mode][sign], level / LEVELS)
        for sign in (FALLS, RISES)
        for level in range(1, LEVELS + 1)
    }


def styles() -> str:
    """The backgrounds: light; dark where the reader prefers it, but not in print."""
    light, dark = (
        "".join(f"{name}{{background:{colour}}}" for name, colour in palette(mode).items())
        for mode in ("light", "dark")
    )
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n"


# Oklab: https://bottosson.github.io/posts/oklab
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _between(start: str, end: str, fraction: float) -> str:
    lab = (1 - fraction) * _oklab(start) + fraction * _oklab(end)
    linear = np.linalg.solve(TO_CONES, np.linalg.solve(TO_LAB, lab) ** 3).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * float(channel)):02x}" for channel in srgb)


def _oklab(colour: str) -> Floats:
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.asarray(TO_LAB @ np.cbrt(TO_CONES @ linear))
