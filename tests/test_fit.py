"""The fit of measured changes on curves that are known, against closed forms and scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from funcprobe.adapters.stages.fit import linear_fit
from funcprobe.types import InputError

ETAS = tuple(1e-8 * 10 ** (i / 2) for i in range(10))  # to 3e-4


def fitted(curve, etas=ETAS, rounding=None, first=3.0, second=0.0):
    marks = [False] * len(etas) if rounding is None else rounding
    return linear_fit(etas, [curve(eta) for eta in etas], marks, first, second)


def test_a_line_is_found():
    found = fitted(lambda eta: -2e-9 + 3 * eta)
    assert found.slope == pytest.approx(3, rel=1e-12)
    assert found.intercept == pytest.approx(-2e-9, rel=1e-9, abs=0)
    # The rows themselves are rounded to 1e-16 of their size.
    assert found.slope_ci == pytest.approx((3, 3), rel=1e-12)
    assert found.intercept_ci == pytest.approx((-2e-9, -2e-9), rel=1e-6, abs=0)
    assert found.r2 == pytest.approx(1, abs=1e-12)
    assert found.r2_ci == pytest.approx((1, 1), abs=1e-12)
    assert (found.points, found.eta_low, found.eta_high) == (10, ETAS[0], ETAS[-1])
    assert found.reason is None


def test_it_is_the_regression_of_relative_changes():
    """measured / eta on 1 / eta, unweighted, where intercept and slope change places."""
    rng = np.random.default_rng(0)
    eta = np.array(ETAS)
    y = 1e-9 + 3 * eta * (1 + 0.05 * rng.standard_normal(10))
    found = linear_fit(ETAS, y, [False] * 10, 3.0, 0.0)
    oracle = stats.linregress(1 / eta, y / eta)
    t = stats.t.ppf(0.975, 8)
    for value, interval, expected, se in (
        (found.slope, found.slope_ci, oracle.intercept, oracle.intercept_stderr),
        (found.intercept, found.intercept_ci, oracle.slope, oracle.stderr),
    ):
        assert value == pytest.approx(expected, rel=1e-9, abs=0)
        assert interval == pytest.approx((expected - t * se, expected + t * se), rel=1e-9, abs=0)


def test_r_squared_and_its_interval():
    """numpy's weighted covariance; Fisher's z by its definition."""
    eta = np.array(ETAS)
    y = -3 * eta * (1 + 0.3 * np.random.default_rng(1).standard_normal(10))
    found = linear_fit(ETAS, y, [False] * 10, -3.0, 0.0)
    ((xx, xy), (_, yy)) = np.cov(eta, y, aweights=1 / eta**2)
    r = xy / math.sqrt(xx * yy)
    assert r < 0
    assert found.r2 == pytest.approx(r**2, rel=1e-9)
    z, half = 0.5 * math.log((1 + r) / (1 - r)), stats.norm.ppf(0.975) / math.sqrt(7)
    ends = np.tanh([z - half, z + half]) ** 2
    assert found.r2_ci == pytest.approx(sorted(ends), rel=1e-9)


def test_an_interval_of_r_that_holds_0_begins_at_0():
    y = [3.0, 1.0, 2.0, 2.5]
    found = linear_fit([1.0, 2.0, 3.0, 4.0], y, [False] * 4, 1.0, 0.0)
    assert found.r2_ci[0] == 0
    assert found.r2 < found.r2_ci[1] < 1


def test_intervals_cover_where_residuals_are_noise():
    """Of 1,000 lines with independent relative errors; 0.021 is three standard errors of a share."""
    rng, n = np.random.default_rng(2), 6
    eta = np.array(ETAS[:n])
    held = np.zeros(2)
    for _ in range(1000):
        y = 2e-9 + 3 * eta + eta * rng.standard_normal(n) * 0.1
        found = linear_fit(eta, y, [False] * n, 3.0, 0.0)
        held += [
            found.slope_ci.low < 3 < found.slope_ci.high,
            found.intercept_ci.low < 2e-9 < found.intercept_ci.high,
        ]
    assert held / 1000 == pytest.approx([0.95, 0.95], abs=0.021)


@pytest.mark.parametrize("sign", [1, -1])
def test_curvature_ends_the_range(sign):
    """eta_star = 2 * 3 / 2e4 = 3e-4: rows up to 3e-5 stay, where the quadratic share is 10 %."""
    found = fitted(lambda eta: 3 * eta + sign * 1e4 * eta**2, second=sign * 2e4)
    assert (found.points, found.eta_high) == (7, ETAS[6])
    assert ETAS[6] < 3e-5 < ETAS[7]
    # The shares of the seven rows are 3.3 %, 1.1 %, 0.3 %, ...: the slope is off by about their mean,
    assert abs(found.slope / 3 - 1) < 0.01
    # and the intercept makes up for that where the change is least.
    assert abs(found.intercept) < 0.02 * 3 * ETAS[0]
    # Unweighted, both are far worse.
    y = [3 * eta + sign * 1e4 * eta**2 for eta in ETAS[:7]]
    unweighted = stats.linregress(ETAS[:7], y)
    assert abs(unweighted.slope / 3 - 1) > 0.03
    assert abs(unweighted.intercept) > 0.1 * 3 * ETAS[0]


def test_the_row_at_a_tenth_of_eta_star_is_in():
    found = fitted(lambda eta: eta + eta**2, etas=(0.25, 0.5, 1.0, 1.0001), first=5.0, second=1.0)
    assert (found.points, found.eta_high) == (3, 1.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_without_a_second_derivative_the_ratios_end_the_range(sign):
    """measured / eta is 3.3 % off at 1e-5 and over 10 % off from 1e-4 on; what follows stays out."""

    def curve(eta):
        return sign * (3 * eta + 1e4 * eta**2 if eta < 2e-4 else 3 * eta)

    found = fitted(curve, second=None, first=sign * 3.0)
    assert (found.points, found.eta_high) == (7, ETAS[6])
    assert fitted(lambda eta: 3 * eta, second=None).points == 10


def test_rows_of_rounding_are_left_out():
    """The three smallest are noise of 1e-7; marked, they do not move the line."""
    noise = dict(zip(ETAS, (1e-7, -1e-7, 1e-7), strict=False))
    found = fitted(lambda eta: 3 * eta + noise.get(eta, 0.0), rounding=[True] * 3 + [False] * 7)
    assert (found.points, found.eta_low) == (7, ETAS[3])
    assert found.slope == pytest.approx(3, rel=1e-12)
    for second in (0.0, None):
        between = fitted(lambda eta: 3 * eta, rounding=[i == 4 for i in range(10)], second=second)
        assert between.points == 9


def test_a_constant_is_the_intercept_and_what_the_least_rows_show():
    """Noise of one size: the intercept's error is that of the smallest change, in its own unit."""
    rng, found = np.random.default_rng(4), []
    eta = np.array(ETAS)
    for _ in range(200):
        fit = linear_fit(ETAS, 3 * eta + 1e-9 * rng.standard_normal(10), [False] * 10, 3.0, 0.0)
        found.append((fit.intercept, fit.slope - 3))
    spread = np.std(found, axis=0)
    assert spread[0] == pytest.approx(1e-9, rel=0.3, abs=0)
    assert spread[1] < 0.1  # 1e-9 / 1e-8, had the least row the slope alone


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("second", [0.0, None])
def test_too_few_rows(rows, second):
    found = fitted(lambda eta: 3 * eta, rounding=[i >= rows for i in range(10)], second=second)
    assert found[:6] == (None,) * 6
    assert found.points == rows
    assert (found.eta_low is None) == (rows == 0)
    assert f"{rows} of 10 rows" in found.reason
    assert f"{10 - rows} are rounding, 0 have a quadratic share" in found.reason
    assert fitted(lambda eta: eta, etas=()).points == 0


def test_a_curve_without_a_linear_range():
    found = fitted(lambda eta: eta**2, first=0.0, second=2.0)
    assert (found.slope, found.points, found.eta_low) == (None, 0, None)
    assert "0 are rounding, 10 have a quadratic share" in found.reason


def test_three_rows_have_no_interval_of_r_squared():
    found = fitted(lambda eta: 3 * eta + eta**1.01, etas=ETAS[:3])
    assert found.r2_ci is None
    assert found.r2 > 0.99
    assert found.slope_ci.low < found.slope < found.slope_ci.high
    assert "needs 4" in found.reason
    assert fitted(lambda eta: 3 * eta, etas=ETAS[:4]).r2_ci is not None


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_equal_changes_have_no_correlation(value):
    found = fitted(lambda eta: value)
    assert (found.r2, found.r2_ci) == (None, None)
    assert "all equal" in found.reason
    assert found.slope == pytest.approx(0, abs=1e-12)
    assert found.intercept == pytest.approx(value)


numbers = st.lists(st.floats(-1, 1), min_size=4, max_size=9)


@given(numbers, st.integers(-200, 200), st.integers(-200, 200), st.booleans())
def test_units_do_not_matter(errors, of_eta, of_measured, known):
    """Of eta and of measured, by powers of two and a sign: the numbers scale, the range stays."""
    a, b = 2.0**of_eta, -(2.0**of_measured)
    etas = [1e-6 * 3**i for i in range(len(errors))]
    y = [eta * (2 + error) for eta, error in zip(etas, errors, strict=True)]
    marks = [i == 1 for i in range(len(etas))]
    found = linear_fit(etas, y, marks, 2.0, 30.0 if known else None)
    scaled = linear_fit(
        [a * eta for eta in etas],
        [b * value for value in y],
        marks,
        2.0 * b / a,
        30.0 * b / a**2 if known else None,
    )
    assert (scaled.points, scaled.r2, scaled.r2_ci, scaled.reason) == (
        found.points,
        found.r2,
        found.r2_ci,
        found.reason,
    )
    if found.slope is not None:
        assert scaled.eta_high == a * found.eta_high
        assert (scaled.slope, scaled.intercept) == (found.slope * b / a, found.intercept * b)
        assert scaled.slope_ci[::-1] == tuple(end * b / a for end in found.slope_ci)
        assert scaled.intercept_ci[::-1] == tuple(end * b for end in found.intercept_ci)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [1.0], [False] * 2, 1.0, 0.0), r"\(2, 1, 2\)"),
        (([2.0, 1.0], [1.0, 1.0], [False] * 2, 1.0, 0.0), "ascend"),
        (([1.0, 1.0], [1.0, 1.0], [False] * 2, 1.0, 0.0), "distinct"),
        (([0.0, 1.0], [1.0, 1.0], [False] * 2, 1.0, 0.0), "positive, ascending"),
        (([1.0, 2.0], [1.0, math.nan], [False] * 2, 1.0, None), "nan"),
        (([1.0, 2.0], [1.0, 1.0], [False] * 2, math.inf, None), "inf"),
        (([1.0, 2.0], [1.0, 1.0], [False] * 2, 1.0, -math.inf), "inf"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        linear_fit(*arguments)
