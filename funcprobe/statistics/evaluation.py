"""E at theta: statistics, importance ratios and baseline in one value, and estimates from them."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from ..policy.layout import response_mask
from ..types import Batch, Entropy, ResponseMask, TokenStats
from . import baselines, estimators
from .estimators import FirstOrder, Measured
from .second_order import SecondOrder, second_order


class Evaluation(NamedTuple):
    """The entropy estimator on E at theta, its baseline fitted; `entropy.baseline` is never "auto"."""

    stats: TokenStats
    mask_NR: ResponseMask
    entropy: Entropy
    log_ratio_NR: Float[Tensor, "N R"] | None  # l(theta) - l(sampler); None where theta sampled
    baseline_NR: Float[Tensor, "N R"] | None  # None: no baseline


def evaluate(
    batch: Batch,
    stats: TokenStats,
    entropy: Entropy = Entropy(),
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    baseline_NR: Float[Tensor, "N R"] | None = None,
) -> Evaluation:
    """E with its statistics at theta, [N, R] in nats; the baseline is a function of these alone.

    Prediction and measurement thus have the same baseline; pass it as `baseline_NR` to avoid fitting it
    again. Raises InputError as `baselines.baseline` does.
    """
    mask_NR = response_mask(batch)
    ratio_NR = None if sampler_logp_NR is None else stats.logp_NR - sampler_logp_NR
    entropy = baselines.resolve(entropy, batch, own_samples=sampler_logp_NR is None)
    if entropy.baseline != "none" and baseline_NR is None:
        baseline_NR = baselines.baseline(entropy.baseline, batch, stats, mask_NR, entropy, ratio_NR)
    return Evaluation(stats, mask_NR, entropy, ratio_NR, baseline_NR)


def value(at: Evaluation) -> float:
    """H(theta), nats per token or per sequence."""
    return estimators.entropy_value(at.stats, at.mask_NR, at.entropy, at.log_ratio_NR)


def derivative(at: Evaluation, tangent: TokenStats, unit_N: Int[Tensor, " N"]) -> FirstOrder:
    """`estimators.first_order` with the baseline's control variate: d/d eta of the estimator.

    In the estimator's unit per unit of eta. Raises InputError for fewer than two units in `unit_N`.
    """
    if at.baseline_NR is not None:
        tangent = baselines.controlled_tangent(
            tangent, at.baseline_NR, at.mask_NR, at.entropy, at.log_ratio_NR
        )
    return estimators.first_order(at.stats, tangent, at.mask_NR, unit_N, at.entropy, at.log_ratio_NR)


def second_derivative(
    at: Evaluation, tangent: TokenStats, second: TokenStats, unit_N: Int[Tensor, " N"]
) -> SecondOrder:
    """`second_order` with the baseline's control variate: d2/d eta2 of the estimator.

    In the estimator's unit per unit of eta^2. Raises InputError for fewer than two units in `unit_N`.
    """
    if at.baseline_NR is not None:
        given = (at.baseline_NR, at.mask_NR, at.entropy, at.log_ratio_NR)
        second = baselines.controlled_second(tangent, second, *given)
        tangent = baselines.controlled_tangent(tangent, *given)
    return second_order(at.stats, tangent, second, at.mask_NR, unit_N, at.entropy, at.log_ratio_NR)


def change(at: Evaluation, moved: TokenStats) -> Measured:
    """`estimators.measured_change` with the baseline's control variate: H(theta') - H(theta).

    `moved` are the statistics of E at theta', [N, R]; the change is in nats per token or per sequence.
    """
    if at.baseline_NR is not None:
        moved = baselines.controlled_stats(
            at.stats, moved, at.baseline_NR, at.mask_NR, at.entropy, at.log_ratio_NR
        )
    return estimators.measured_change(at.stats, moved, at.mask_NR, at.entropy, at.log_ratio_NR)


def gradient_coefficients(at: Evaluation) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """`estimators.gradient_coefficients` with the baseline's control variate."""
    pair = estimators.gradient_coefficients(at.stats, at.mask_NR, at.entropy, at.log_ratio_NR)
    if at.baseline_NR is None:
        return pair
    return baselines.controlled_coefficients(
        pair, at.baseline_NR, at.mask_NR, at.entropy, at.log_ratio_NR
    )
