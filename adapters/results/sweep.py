"""The sweep in results.json: a row an eta, the second derivative, the fits."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import stats as scipy_stats

import funcprobe
from funcprobe.statistics.intervals import Error, Interval, delta_error, student, sum_error, total

from ..stages.fit import CURVED, linear_fit

if TYPE_CHECKING:
    from ..stages.sweep import Point, Sweep

ROUNDING_SHARE = 0.1  # rounding is said to take over where it reaches this share of the change
MIN_POINTS = 3  # of a straight line, so that R^2 says something


class Errors(NamedTuple):
    """Errors of the derivative along v, per unit of eta, with their degrees of freedom."""

    given_U: Error
    over_U: Error
    total: Error


class Line(NamedTuple):
    """A straight line in log-log coordinates."""

    slope: float
    r_squared: float
    points: int


def quantity(value: float, unit: str, normalised_by: str) -> dict[str, Any]:
    """A number with its unit and what it is normalised by."""
    return {"value": value, "unit": unit, "normalised_by": normalised_by}


def interval(value: float, error: Error) -> dict[str, float]:
    """95 %, with the degrees of freedom that make it from the standard error."""
    return {**student(value, error)._asdict(), "degrees_of_freedom": error.dof}


def errors_of(prediction: funcprobe.Prediction, unit_N: torch.Tensor, prompt_N: torch.Tensor) -> Errors:
    """`unit_N`: sampling units of E; `prompt_N`: prompts of U."""
    given_U = delta_error(prediction.first_order.influence_N, unit_N)
    over_U = sum_error(prediction.t_N, prompt_N)
    return Errors(given_U, over_U, total(given_U, over_U))


def rows(
    prediction: funcprobe.Prediction,
    unit_N: torch.Tensor,
    sweep: "Sweep",
    errors: Errors,
    unit: str,
    next_lr: float,
) -> list[dict[str, Any]]:
    """Predicted, measured, their difference, and the verdict on the weights, for every eta."""

    def row(point: "Point") -> dict[str, Any]:
        eta, measured, hygiene = point.eta, point.measured, point.diagnostics
        predicted = eta * prediction.derivative
        gap = measured.delta - predicted
        gap_N = measured.influence_N - eta * prediction.first_order.influence_N
        spread = delta_error(measured.influence_N, unit_N)
        gap_spread = delta_error(gap_N, unit_N)
        wide = Error(eta * errors.total.se, errors.total.dof)
        holds = hygiene.verdict != "resample"
        narrow = Error(eta * errors.given_U.se, errors.given_U.dof)
        return {
            "eta": eta,
            "is_next_lr": eta == next_lr,
            "predicted": quantity(predicted, unit, "over E"),
            "se_given_U": quantity(narrow.se, unit, "units of E"),
            "se_total": quantity(wide.se, unit, "units of E and prompts of U"),
            "interval_given_U": interval(predicted, narrow),
            "interval_total": interval(predicted, wide),
            "second_order": None
            if sweep.curvature is None
            else quantity(
                predicted + eta**2 * sweep.curvature.second / 2, unit, "with the quadratic term"
            ),
            "measured": quantity(measured.delta, unit, "over E"),
            "measured_se_given_U": quantity(spread.se, unit, "units of E"),
            "measured_interval_given_U": interval(measured.delta, spread) if holds else None,
            "difference": quantity(gap, unit, "measured - predicted, on the same samples"),
            "difference_se": quantity(gap_spread.se, unit, "units of E"),
            "difference_interval": interval(gap, gap_spread) if holds else None,
            "ratio": quantity(measured.delta / predicted, "1", "measured / predicted"),
            "ess": quantity(measured.ess, "sequences", "whole-response importance weights"),
            "max_weight": quantity(measured.max_weight, "1", "mean weight"),
            "clipped": quantity(measured.clipped, "sequences", "entropy.clip"),
            "clip_fraction": hygiene.clip_fraction,
            "pareto_k": hygiene.pareto_k,
            "verdict": hygiene.verdict,
            "verdict_reason": hygiene.reason,
            "rounding": _is_rounding(measured.delta, sweep.rounding_noise),
            "resampled": None
            if point.fresh is None
            else {
                "change": quantity(point.fresh.delta, unit, "sampled at theta + eta v, less E"),
                "se": quantity(point.fresh.error.se, unit, "units of E, each with both responses"),
                "interval": interval(point.fresh.delta, point.fresh.error),
                "cut_off": point.fresh.rollouts.finish_reason.count("length"),
            },
        }

    return [row(point) for point in sweep.points]


def second_order(prediction: funcprobe.Prediction, sweep: "Sweep", unit: str) -> dict[str, Any] | None:
    """The second derivative along v, its error, and the eta where first order ends."""
    bend = sweep.curvature
    if bend is None:
        return None
    star = funcprobe.eta_star(prediction.derivative, bend.second)
    rate = f"{unit} per squared unit of learning rate"
    bent = student(bend.second, bend.error)
    largest, least = max(map(abs, bent)), min(map(abs, bent))
    bends = bent.low * bent.high > 0  # else H'' is not told from 0, and first order may go on
    rounding = None
    if bend.eta is not None and sweep.rounding_noise is not None:
        rounding = quantity(math.sqrt(2) * sweep.rounding_noise / bend.eta**2, rate, "sd of rounding")
    return {
        "method": "Taylor mode" if bend.eta is None else "symmetric difference",
        "difference_eta": bend.eta,
        "second_derivative": quantity(bend.second, rate, "over E"),
        "se_given_U": quantity(bend.error.se, rate, "units of E"),
        "interval_given_U": interval(bend.second, bend.error),
        "rounding": rounding,
        "eta_star": None
        if math.isinf(star)
        else quantity(star, "learning rate", "the quadratic term is as large as the linear one"),
        "linear_until": {
            "what": "the quadratic term is 10 % of the linear one, the interval that of H'' alone",
            "eta": None if math.isinf(star) else CURVED * star,
            "low": CURVED * funcprobe.eta_star(prediction.derivative, largest) if largest else None,
            "high": CURVED * funcprobe.eta_star(prediction.derivative, least) if bends else None,
        },
    }


def log_log(x: list[float], y: list[float]) -> Line | None:
    """Least squares of log |y| on log x.

    None for fewer than three points, a zero among them, or values that are all equal.
    """
    if len(x) < MIN_POINTS or not all(y):
        return None
    fit = scipy_stats.linregress(np.log(x), np.log(np.abs(y)))
    if not math.isfinite(fit.rvalue):
        return None
    return Line(float(fit.slope), float(fit.rvalue) ** 2, len(x))


def _is_rounding(delta: float, noise: float | None) -> bool:
    return noise is not None and noise > ROUNDING_SHARE * abs(delta)


def fits(prediction: funcprobe.Prediction, sweep: "Sweep", unit: str) -> dict[str, Any]:
    """Straight lines through the sweep, and where rounding ends it."""
    noise = sweep.rounding_noise
    line = linear_fit(
        [p.eta for p in sweep.points],
        [p.measured.delta for p in sweep.points],
        [_is_rounding(p.measured.delta, noise) for p in sweep.points],
        prediction.derivative,
        None if sweep.curvature is None else sweep.curvature.second,
    )
    kept = [
        (p.eta, p.measured.delta)
        for p in sweep.points
        if not _is_rounding(p.measured.delta, noise) and p.eta <= (line.eta_high or math.inf)
    ]
    curve = log_log([eta for eta, _ in kept], [delta for _, delta in kept])
    # |ratio - 1| says something where rounding is a small share of the deviation itself.
    deviations = [
        (eta, delta / (eta * prediction.derivative) - 1, delta - eta * prediction.derivative)
        for eta, delta in kept
    ]
    clear = [(eta, r) for eta, r, d in deviations if noise is None or noise < ROUNDING_SHARE * abs(d)]
    bend = log_log([eta for eta, _ in clear], [r for _, r in clear])
    floor = None
    if noise is not None:
        floor = noise / (ROUNDING_SHARE * abs(prediction.derivative))
    return {
        "linear": {
            "unit": f"intercept {unit}, slope {unit} per unit of learning rate",
            "what": "measured = intercept + slope * eta, weights 1 / eta^2; intervals: "
            "the scatter of the rows about the line, 95 %",
            **{
                key.replace("_ci", "_interval"): x._asdict() if isinstance(x, Interval) else x
                for key, x in line._asdict().items()
            },
        },
        "measured_against_eta": _line(curve, "log |measured| on log eta; 1 is linear"),
        "deviation_against_eta": _line(bend, "log |ratio - 1| on log eta; 1 is a quadratic term"),
        "rounding_noise": None if noise is None else quantity(noise, unit, "one measured change"),
        "rounding_eta": None
        if floor is None
        else quantity(floor, "learning rate", f"rounding = {ROUNDING_SHARE:.0%} of the change"),
    }


def _line(line: Line | None, what: str) -> dict[str, Any] | None:
    return None if line is None else {"what": what, **line._asdict()}
