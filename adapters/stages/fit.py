"""A linear fit of the measured changes over the learning rates at which they are linear."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from funcprobe.statistics.intervals import LEVEL, Error, Interval, student
from funcprobe.statistics.second_order import eta_star
from funcprobe.types import InputError

CURVED = 0.1  # quadratic share of the change at which the linear range ends
FEWEST_POINTS = 3  # two parameters, and one degree of freedom for the residuals
FISHER_POINTS = 4  # the variance of Fisher's z is 1 / (n - 3)


class Fit(NamedTuple):
    """measured = intercept + slope * eta; intervals are of 95 %, None where undefined."""

    slope: float | None  # in the unit of measured, per unit of learning rate
    slope_ci: Interval | None
    intercept: float | None  # in the unit of measured
    intercept_ci: Interval | None
    r2: float | None  # squared weighted correlation of measured and eta
    r2_ci: Interval | None
    points: int  # rows in the linear range
    eta_low: float | None  # smallest and largest eta of these rows
    eta_high: float | None
    reason: str | None  # why a number is None


def linear_fit(
    eta_n: Sequence[float],
    measured_n: Sequence[float],
    rounding_n: Sequence[bool],
    first: float,
    second: float | None,
) -> Fit:
    """Least squares of measured on eta with weights 1 / eta^2, over the linear range.

    The range contains the rows that `rounding_n` does not mark and whose quadratic share
    |eta second / (2 first)| is at most 10 %, that is, eta <= eta_star / 10, independently of
    `measured_n`. If `second` is None, it contains the unmarked rows up to the first whose measured /
    eta differs by over 10 % from that of the smallest, a selection that flatters the fit.

    Weights. In the range rounding, constant, and curvature, growing as eta^2, are each at most a tenth
    of the change, so that errors are bounded relative to it and each row counts equally relative to its
    size. Unweighted, over decades of eta, the largest rows alone would determine the line: 10 % of
    curvature there would change the slope by as much, and the intercept by more than the smallest
    changes.

    Intervals. Student's t with n - 2 degrees of freedom for slope and intercept; Fisher's z = artanh r
    with variance 1 / (n - 3) for r, squared, for R^2, whose own distribution is skewed at 1. All assume
    residuals to be independent noise. They are mostly curvature, the same in every repetition, and all
    rows share the samples of E: the intervals describe the scatter of the rows about one line, not the
    error of that line, for which the standard errors of the rows are given.

    Never fails for too few rows: undefined values are None, with the reason. Raises InputError for
    lengths that differ, etas that are not positive and ascending, and numbers that are not finite.
    """
    _require_rows(eta_n, measured_n, rounding_n, first, second)
    kept = [
        (eta, value)
        for eta, value, rounding in zip(eta_n, measured_n, rounding_n, strict=True)
        if not rounding
    ]
    rows = _linear_range(kept, first, second)
    if len(rows) < FEWEST_POINTS:
        marked = len(eta_n) - len(kept)
        reason = (
            f"{len(rows)} of {len(eta_n)} rows are in the linear range, {FEWEST_POINTS} are needed: "
            f"{marked} are rounding, {len(kept) - len(rows)} have a quadratic share over {CURVED:.0%}"
        )
        return _without_line(rows, reason)
    eta = np.array([e for e, _ in rows])
    return _line(eta, np.array([value for _, value in rows]))


def _linear_range(
    kept: list[tuple[float, float]], first: float, second: float | None
) -> list[tuple[float, float]]:
    """The rows, ascending in eta, in the linear range."""
    if second is not None:
        return [row for row in kept if row[0] <= CURVED * eta_star(first, second)]
    for i, (eta, value) in enumerate(kept):
        least = kept[0][1] / kept[0][0]
        if abs(value / eta - least) > CURVED * abs(least):
            return kept[:i]
    return kept


def _without_line(rows: list[tuple[float, float]], reason: str) -> Fit:
    low, high = (rows[0][0], rows[-1][0]) if rows else (None, None)
    return Fit(None, None, None, None, None, None, len(rows), low, high, reason)


def _line(eta_n: NDArray[np.float64], measured_n: NDArray[np.float64]) -> Fit:
    """Weighted least squares from sums about the weighted means, both variables scaled to about 1."""
    n, top, size = len(eta_n), float(eta_n[-1]), float(np.abs(measured_n).max()) or 1.0
    x_n, y_n = eta_n / top, measured_n / size
    w_n = (x_n[0] / x_n) ** 2
    x, y = (float((w_n * v).sum() / w_n.sum()) for v in (x_n, y_n))
    dx_n, dy_n = x_n - x, y_n - y
    sxx, sxy, syy = (float((w_n * v).sum()) for v in (dx_n**2, dx_n * dy_n, dy_n**2))
    slope, intercept = sxy / sxx, y - sxy / sxx * x
    variance = float((w_n * (dy_n - slope * dx_n) ** 2).sum()) / (n - 2)
    of_slope = Error(math.sqrt(variance / sxx), n - 2)
    of_intercept = Error(math.sqrt(variance * (1 / float(w_n.sum()) + x**2 / sxx)), n - 2)
    r, reason = None, None
    if measured_n.min() < measured_n.max():
        r = min(1.0, abs(sxy) / math.sqrt(sxx * syy))
        if n < FISHER_POINTS:
            reason = f"{n} rows: an interval of R^2 needs {FISHER_POINTS}"
    else:
        reason = "the measured changes are all equal: they have no correlation"
    return Fit(
        slope=slope * size / top,
        slope_ci=_scaled(student(slope, of_slope), size / top),
        intercept=intercept * size,
        intercept_ci=_scaled(student(intercept, of_intercept), size),
        r2=None if r is None else r**2,
        r2_ci=None if r is None or n < FISHER_POINTS else _fisher(r, n),
        points=n,
        eta_low=float(eta_n[0]),
        eta_high=top,
        reason=reason,
    )


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(interval.low * factor, interval.high * factor)


def _fisher(r: float, n: int) -> Interval:
    """Interval of R^2 from tanh(artanh r +- 1.96 / sqrt(n - 3)), r >= 0; from 0 if r = 0 is in it."""
    if r == 1:
        return Interval(1.0, 1.0)
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) / math.sqrt(n - 3)
    low, high = (math.tanh(math.atanh(r) + sign * half) for sign in (-1, 1))
    return Interval(max(0.0, low) ** 2, high**2)


def _require_rows(
    eta_n: Sequence[float],
    measured_n: Sequence[float],
    rounding_n: Sequence[bool],
    first: float,
    second: float | None,
) -> None:
    lengths = len(eta_n), len(measured_n), len(rounding_n)
    if len(set(lengths)) > 1:
        raise InputError(f"{lengths} etas, changes and rounding marks: one of each per row is expected")
    numbers = (*eta_n, *measured_n, first, 0.0 if second is None else second)
    if not all(map(math.isfinite, numbers)):
        raise InputError(
            f"finite numbers are expected, not {[x for x in numbers if not math.isfinite(x)]}"
        )
    if any(low >= high for low, high in pairwise((0.0, *eta_n))):
        raise InputError(f"etas {list(eta_n)}: distinct, positive, ascending ones are expected")
