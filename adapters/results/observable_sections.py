"""What results.json holds of the observables beside the entropy."""

from .quantity import Quantity, Section, StudentInterval


class ObservableRow(Section):
    """Predicted and measured change of an observable at one learning rate."""

    eta: float
    """Learning rate: parameters are theta + eta v. The row of `sweep` has the weights' verdict."""
    is_next_lr: bool
    """Whether it is the learning rate of the next step."""
    predicted: Quantity
    """eta times the derivative along v."""
    interval_given_U: StudentInterval
    """Of the prediction, over the draws of E, v held fixed."""
    measured: Quantity
    """Value at theta + eta v less that at theta, by self-normalised importance sampling on E."""
    measured_interval_given_U: StudentInterval | None
    """null: the verdict on the weights is "resample"."""
    difference: Quantity
    """measured - predicted, on the same samples."""
    difference_interval: StudentInterval | None
    """null: the verdict on the weights is "resample"."""
    ratio: Quantity | None
    """measured / predicted; null: the predicted change is 0."""
    rounding: bool | None
    """Whether rounding exceeds 10 % of the measured change; null: not known (kl_base)."""


class Observable(Section):
    """A function of the response, or of its tokens, observed on E."""

    name: str
    """As in measure.observables."""
    weights: str
    """Importance weights per_decision (prefix) or of the whole sequence."""
    baseline: str
    """Control variate of the score term; none where the function applies to some responses only."""
    responses: int
    """Of E, to which it applies; the others are left out of numerator and denominator."""
    at_theta: Quantity
    """The value."""
    interval: StudentInterval
    """Of the value, over the draws of E."""
    derivative: Quantity
    """Along v at eta = 0, per unit of learning rate."""
    se_given_U: Quantity
    """Of the derivative, over the draws of E, v held fixed."""
    interval_given_U: StudentInterval
    """Of the derivative, over the draws of E, v held fixed."""
    sweep: tuple[ObservableRow, ...]
    """By ascending learning rate."""
