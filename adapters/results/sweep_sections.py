"""The sweep over learning rates in results.json: a row an eta, the second derivative, the fits."""

from typing import Literal

from .quantity import Interval, Quantity, Section, StudentInterval


class LinearUntil(Section):
    """The learning rate at which the quadratic term is 10 % of the linear one, eta* / 10."""

    what: str
    """Definition of eta, and of its interval."""
    eta: float | None
    """null: the second derivative is 0."""
    low: float | None
    """By the larger bound (in magnitude) of the second derivative's interval; null: both are 0."""
    high: float | None
    """null: the second derivative is indistinguishable from 0."""


class SecondOrder(Section):
    """d2/d eta2 of the entropy along v."""

    method: str
    """Taylor mode (exact) or symmetric difference."""
    difference_eta: float | None
    """Step of the symmetric difference, a learning rate; null: exact, by Taylor mode."""
    second_derivative: Quantity
    """Over E, per squared unit of learning rate."""
    se_given_U: Quantity
    """Over the draws of E, v held fixed."""
    interval_given_U: StudentInterval
    """Of the second derivative, over the draws of E, v held fixed."""
    rounding: Quantity | None
    """Standard deviation of rounding in the symmetric difference; null: exact."""
    eta_star: Quantity | None
    """2 |first / second derivative|; null: the second derivative is 0."""
    linear_until: LinearUntil
    """Where the quadratic term reaches 10 % of the linear one."""


class Resampled(Section):
    """Entropy of responses sampled at theta + eta v, minus that of E: no importance weights."""

    change: Quantity
    """Entropy at theta + eta v minus that of E."""
    se: Quantity
    """Over the draws of E, each with both of its responses."""
    interval: StudentInterval
    """Of the change."""
    cut_off: int
    """Responses that reached the length limit."""


class SweepRow(Section):
    """Predicted and measured change of the entropy at one learning rate."""

    eta: float
    """Learning rate: parameters are theta + eta v."""
    is_next_lr: bool
    """Whether it is the learning rate of the next step."""
    predicted: Quantity
    """eta times the derivative along v."""
    se_given_U: Quantity
    """Of the prediction, over the draws of E, v held fixed."""
    se_total: Quantity
    """Of the prediction, over the draws of E, the prompts of U and, with step.masks, dropout masks."""
    interval_given_U: StudentInterval
    """Of the prediction, over the draws of E, v held fixed."""
    interval_total: StudentInterval
    """Of the prediction, over the draws of E, the prompts of U and, with step.masks, dropout masks."""
    second_order: Quantity | None
    """Prediction with the quadratic term, eta^2 H''/2; null: second order is off."""
    measured: Quantity
    """H(theta + eta v) - H(theta) by self-normalised importance sampling on E."""
    measured_se_given_U: Quantity
    """Of the measured change, over the draws of E, v held fixed."""
    measured_interval_given_U: StudentInterval | None
    """null: the verdict is "resample"."""
    difference: Quantity
    """measured - predicted, on the same samples."""
    difference_se: Quantity
    """Of the difference, over the draws of E, v held fixed."""
    difference_interval: StudentInterval | None
    """null: the verdict is "resample"."""
    ratio: Quantity
    """measured / predicted."""
    ess: Quantity
    """Effective sample size of the importance weights of whole responses, (sum w)^2 / sum w^2."""
    max_weight: Quantity
    """Largest importance weight over the mean weight."""
    clipped: Quantity
    """Sequences whose weight was clipped at entropy.clip."""
    clip_fraction: float
    """The same as a share of the sequences."""
    pareto_k: float | None
    """Shape of the generalised Pareto tail of the weights; null: verdict_reason states why."""
    verdict: Literal["trust", "caution", "resample"]
    """Whether the measured change and its interval can be relied on."""
    verdict_reason: str
    """The numbers that the verdict rests on, in one line."""
    rounding: bool
    """Whether rounding exceeds 10 % of the measured change."""
    resampled: Resampled | None
    """null: not resampled at this learning rate."""


class LinearFit(Section):
    """Weighted least squares of the measured change on eta, over the linear range."""

    unit: str
    """Units of intercept and slope."""
    what: str
    """Model, weights, intervals."""
    slope: float | None
    """The derivative along v, as the measured changes have it."""
    slope_interval: Interval | None
    """From the scatter of the rows about the line."""
    intercept: float | None
    """0 up to scatter, if nothing is wrong."""
    intercept_interval: Interval | None
    """From the scatter of the rows about the line."""
    r2: float | None
    """Squared weighted correlation of measured and eta."""
    r2_interval: Interval | None
    """By Fisher's z."""
    points: int
    """Rows in the linear range."""
    eta_low: float | None
    """Smallest learning rate in the linear range."""
    eta_high: float | None
    """Largest learning rate in the linear range."""
    reason: str | None
    """Why a number is null."""


class LogLogFit(Section):
    """Least squares of a logarithm on log eta."""

    what: str
    """The two axes, and the slope that is expected."""
    slope: float
    """Exponent of eta."""
    r_squared: float
    """Squared correlation of the logarithms."""
    points: int
    """Rows of the sweep that are fitted."""


class Fits(Section):
    """Fits over the sweep, and the numerical floor."""

    linear: LinearFit
    """Measured change on eta."""
    measured_against_eta: LogLogFit | None
    """log |measured| on log eta; slope 1: linear."""
    deviation_against_eta: LogLogFit | None
    """log |ratio - 1| on log eta; slope 1: first order misses the quadratic term alone."""
    rounding_noise: Quantity | None
    """Standard deviation of rounding in one measured change; null: v changes no log-probability."""
    rounding_eta: Quantity | None
    """The numerical floor: below this learning rate rounding exceeds 10 % of the measured change."""
