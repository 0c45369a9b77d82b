"""The sweep -> results.json: a row an eta, the second derivative, the fits."""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats as scipy_stats

import funcprobe
from funcprobe.statistics.intervals import Error, delta_error, student, total
from funcprobe.statistics.intervals import Interval as Bounds

from ..stages.fit import CURVED, Fit, linear_fit
from ..stages.sweep import Point, Sweep
from .quantity import Interval, quantity, student_interval
from .sweep_sections import Fits, LinearFit, LinearUntil, LogLogFit, Resampled, SecondOrder, SweepRow

ROUNDING_SHARE = 0.1  # of the measured change: the numerical floor is where rounding reaches it
MIN_POINTS = 3  # of a log-log fit, so that R^2 is informative


class Errors(NamedTuple):
    """Errors of the derivative along v, per unit of eta, with their degrees of freedom."""

    given_U: Error
    over_U: Error
    masks: Error | None  # of one dropout mask about the mean; None: no masks
    total: Error
    next_U: Error  # along the step that another U of this size makes


class Line(NamedTuple):
    """A linear fit in log-log coordinates."""

    slope: float
    r_squared: float
    points: int


def errors_of(prediction: funcprobe.Prediction, unit_N: torch.Tensor, *, known_step: bool) -> Errors:
    """`unit_N`: sampling units of E. The error over U is 0 if v is the known step's own."""
    given_U = delta_error(prediction.first_order.influence_N, unit_N)
    over_U = Error(0.0, prediction.over_u.dof) if known_step else prediction.over_u
    twice = Error(math.sqrt(2) * over_U.se, over_U.dof)
    masks = None
    if found := prediction.masks:
        masks = Error(found.se, len(found.derivative) - 1)
    of_step = [masks] if masks else []
    return Errors(
        given_U, over_U, masks, total(given_U, over_U, *of_step), total(given_U, twice, *of_step)
    )


def sweep_rows(
    prediction: funcprobe.Prediction,
    unit_N: torch.Tensor,
    sweep: Sweep,
    errors: Errors,
    unit: str,
    next_lr: float,
) -> tuple[SweepRow, ...]:
    """Predicted and measured change, their difference, and the weights' verdict, for every eta."""

    def row(point: Point) -> SweepRow:
        eta, measured, diagnostics = point.eta, point.measured, point.diagnostics
        predicted = eta * prediction.derivative
        difference = measured.delta - predicted
        difference_N = measured.influence_N - eta * prediction.first_order.influence_N
        measured_error = delta_error(measured.influence_N, unit_N)
        difference_error = delta_error(difference_N, unit_N)
        predicted_total = Error(eta * errors.total.se, errors.total.dof)
        predicted_given_U = Error(eta * errors.given_U.se, errors.given_U.dof)
        holds = diagnostics.verdict != "resample"
        return SweepRow(
            eta=eta,
            is_next_lr=eta == next_lr,
            predicted=quantity(predicted, unit, "over E"),
            se_given_U=quantity(predicted_given_U.se, unit, "sampling units of E"),
            se_total=quantity(
                predicted_total.se,
                unit,
                "sampling units of E and prompts of U" + (", dropout masks" if errors.masks else ""),
            ),
            interval_given_U=student_interval(predicted, predicted_given_U),
            interval_total=student_interval(predicted, predicted_total),
            second_order=None
            if sweep.curvature is None
            else quantity(
                predicted + eta**2 * sweep.curvature.second / 2, unit, "with the quadratic term"
            ),
            measured=quantity(measured.delta, unit, "over E"),
            measured_se_given_U=quantity(measured_error.se, unit, "sampling units of E"),
            measured_interval_given_U=student_interval(measured.delta, measured_error)
            if holds
            else None,
            difference=quantity(difference, unit, "measured - predicted, on the same samples"),
            difference_se=quantity(difference_error.se, unit, "sampling units of E"),
            difference_interval=student_interval(difference, difference_error) if holds else None,
            ratio=quantity(measured.delta / predicted, "1", "measured / predicted"),
            ess=quantity(measured.ess, "sequences", "importance weights of whole responses"),
            max_weight=quantity(measured.max_weight, "1", "relative to the mean weight"),
            clipped=quantity(measured.clipped, "sequences", "weights above entropy.clip"),
            clip_fraction=diagnostics.clip_fraction,
            pareto_k=diagnostics.pareto_k,
            verdict=diagnostics.verdict,
            verdict_reason=diagnostics.reason,
            rounding=is_rounding(measured.delta, sweep.rounding_noise),
            resampled=_resampled(point, unit),
        )

    return tuple(row(point) for point in sweep.points)


def second_order(prediction: funcprobe.Prediction, sweep: Sweep, unit: str) -> SecondOrder | None:
    """The second derivative along v, its error, and the eta where first order ends."""
    curvature = sweep.curvature
    if curvature is None:
        return None
    star = funcprobe.eta_star(prediction.derivative, curvature.second)
    rate = f"{unit} per squared unit of learning rate"
    bounds = student(curvature.second, curvature.error)
    largest, least = max(map(abs, bounds)), min(map(abs, bounds))
    distinct = bounds.low * bounds.high > 0  # else H'' is indistinguishable from 0
    rounding = None
    if curvature.eta is not None and sweep.rounding_noise is not None:
        sd = math.sqrt(2) * sweep.rounding_noise / curvature.eta**2
        rounding = quantity(sd, rate, "standard deviation of rounding")
    return SecondOrder(
        method="Taylor mode" if curvature.eta is None else "symmetric difference",
        difference_eta=curvature.eta,
        second_derivative=quantity(curvature.second, rate, "over E"),
        se_given_U=quantity(curvature.error.se, rate, "sampling units of E"),
        interval_given_U=student_interval(curvature.second, curvature.error),
        rounding=rounding,
        eta_star=None
        if math.isinf(star)
        else quantity(star, "learning rate", "the quadratic term is as large as the linear one"),
        linear_until=LinearUntil(
            what="the quadratic term is 10 % of the linear one; the interval is that of H'' alone",
            eta=None if math.isinf(star) else CURVED * star,
            low=CURVED * funcprobe.eta_star(prediction.derivative, largest) if largest else None,
            high=CURVED * funcprobe.eta_star(prediction.derivative, least) if distinct else None,
        ),
    )


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


def fits(prediction: funcprobe.Prediction, sweep: Sweep, unit: str) -> Fits:
    """Linear and log-log fits over the sweep, and the numerical floor."""
    noise = sweep.rounding_noise
    line = linear_fit(
        [p.eta for p in sweep.points],
        [p.measured.delta for p in sweep.points],
        [is_rounding(p.measured.delta, noise) for p in sweep.points],
        prediction.derivative,
        None if sweep.curvature is None else sweep.curvature.second,
    )
    kept = [
        (p.eta, p.measured.delta)
        for p in sweep.points
        if not is_rounding(p.measured.delta, noise) and p.eta <= (line.eta_high or math.inf)
    ]
    # |ratio - 1| is informative where rounding is a small share of the deviation itself.
    deviations = [
        (eta, delta / (eta * prediction.derivative) - 1, delta - eta * prediction.derivative)
        for eta, delta in kept
    ]
    clear = [(eta, r) for eta, r, d in deviations if noise is None or noise < ROUNDING_SHARE * abs(d)]
    floor = None
    if noise is not None:
        floor = noise / (ROUNDING_SHARE * abs(prediction.derivative))
    return Fits(
        linear=_linear(line, unit),
        measured_against_eta=_log_log_fit(kept, "log |measured| on log eta; 1: linear"),
        deviation_against_eta=_log_log_fit(clear, "log |ratio - 1| on log eta; 1: a quadratic term"),
        rounding_noise=None if noise is None else quantity(noise, unit, "one measured change"),
        rounding_eta=None
        if floor is None
        else quantity(floor, "learning rate", f"rounding = {ROUNDING_SHARE:.0%} of the change"),
    )


def _resampled(point: Point, unit: str) -> Resampled | None:
    fresh = point.fresh
    if fresh is None:
        return None
    return Resampled(
        change=quantity(fresh.delta, unit, "responses sampled at theta + eta v, minus E"),
        se=quantity(fresh.error.se, unit, "sampling units of E, each with both responses"),
        interval=student_interval(fresh.delta, fresh.error),
        cut_off=fresh.rollouts.finish_reason.count("length"),
    )


def is_rounding(delta: float, noise: float | None) -> bool:
    """Whether rounding is more than a tenth of a measured change."""
    return noise is not None and noise > ROUNDING_SHARE * abs(delta)


def _linear(fit: Fit, unit: str) -> LinearFit:
    def interval(bounds: Bounds | None) -> Interval | None:
        return None if bounds is None else Interval(low=bounds.low, high=bounds.high)

    return LinearFit(
        unit=f"intercept {unit}, slope {unit} per unit of learning rate",
        what="measured = intercept + slope * eta, weights 1 / eta^2; intervals: 95 %, from the scatter "
        "of the rows about the line",
        slope=fit.slope,
        slope_interval=interval(fit.slope_ci),
        intercept=fit.intercept,
        intercept_interval=interval(fit.intercept_ci),
        r2=fit.r2,
        r2_interval=interval(fit.r2_ci),
        points=fit.points,
        eta_low=fit.eta_low,
        eta_high=fit.eta_high,
        reason=fit.reason,
    )


def _log_log_fit(points: list[tuple[float, float]], what: str) -> LogLogFit | None:
    line = log_log([eta for eta, _ in points], [value for _, value in points])
    return None if line is None else LogLogFit(what=what, **line._asdict())
