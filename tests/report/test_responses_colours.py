"""Colours of shares: readable, and told apart by the colour-blind."""

import itertools

import numpy as np
import pytest

from funcprobe.adapters.report.responses import colours
from funcprobe.adapters.report.theme import COLOURS

# Machado, Oliveira, Fernandes (2009), severity 1; on linear RGB.
BLIND = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def _linear(colour):
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _contrast(one, other):
    """WCAG 2."""
    light, dark = sorted(
        (float(_linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True
    )
    return (light + 0.05) / (dark + 0.05)


def _lab(linear):
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ linear
    )
    f = np.cbrt(np.clip(xyz / [0.9505, 1.0, 1.089], 0, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _theme(name, mode):
    return next(getattr(colour, mode) for colour in COLOURS if colour.name == name)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_is_read_on_every_level(mode):
    levels = colours.palette(mode)
    assert len(levels) == 2 * colours.LEVELS
    for background in levels.values():
        assert _contrast(_theme("ink", mode), background) >= 4.5
    assert _contrast(_theme("ink", mode), "#000000") != _contrast(_theme("ink", mode), "#ffffff")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_levels_grow_away_from_the_page(mode):
    levels, page = colours.palette(mode), _lab(_linear(_theme("page", mode)))
    for sign in (colours.FALLS, colours.RISES):
        far = [np.linalg.norm(_lab(_linear(levels[f"{sign}{i}"])) - page) for i in range(1, 11)]
        assert far == sorted(far)
        assert all(b - a > 1.5 for a, b in itertools.pairwise([0.0, *far]))


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("kind", BLIND)
def test_the_colour_blind_tell_the_signs(mode, kind):
    levels = colours.palette(mode)

    def seen(name):
        return _lab(np.clip(np.reshape(BLIND[kind], (3, 3)) @ _linear(levels[name]), 0, 1))

    for level in range(3, 11):
        assert np.linalg.norm(seen(f"f-{level}") - seen(f"r-{level}")) > 10


def test_the_style_sheet_has_every_level_in_both_modes():
    styles = colours.styles()
    for mode in ("light", "dark"):
        for name, background in colours.palette(mode).items():
            assert f"{name}{{background:{background}}}" in styles


def test_equal_shares_have_the_full_colour_and_zeros_none():
    scale = colours.scale(np.full(5, -2.0))
    assert scale == colours.Scale(2.0, 0.0)
    assert colours.levels(np.array([-2.0, 0.0, np.nan]), scale) == ["f-10", "", ""]
    assert colours.levels(np.zeros(3), colours.scale(np.zeros(3))) == ["", "", ""]
    few = np.zeros(1000)
    few[7] = 3.0
    assert colours.levels(few, colours.scale(few))[7] == "r-10"
