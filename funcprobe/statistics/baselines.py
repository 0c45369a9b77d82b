"""Baselines for the score term: less variance, the same expectation, in prediction and measurement.

The derivative of the entropy is sum_j h'_ij + sum_j l'_ij Q_ij, with Q_ij the sum of the integrand
after token j. As E[l'_ij | prefix] = 0, any b_ij that depends on sequence i only through its prefix
before token j may be subtracted from Q_ij (up to O(1/N): the mean R in every Q includes sequence i). In
the measured change it becomes a control variate: with r_ij = l_ij(theta') - l_ij(theta), the entropy of
token j is replaced by

    h_ij(theta') - rho_ij (exp(r_ij) - 1) b_ij    weights = "per_decision": those of j's prefix
    h_ij(theta') - (1 - exp(-r_ij)) b_ij          weights = "sequence": those of the response

rho_ij = p_theta / p_sampler of the token. The subtracted term, times its weight, has expectation 0 for
every theta'; at theta' = theta it is 0, with derivative rho l' b (or l' b). A baseline thus only
changes the token statistics passed to the estimators, and the prediction remains the exact derivative
of the measured quantity.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..types import Baseline, Batch, Entropy, InputError, ResponseMask, TokenStats
from . import estimators
from .regression import LEAST_PROMPTS, prefix_features, ridge


def resolve(entropy: Entropy, batch: Batch, *, own_samples: bool) -> Entropy:
    """The estimator with baseline "auto" resolved: "ridge" if the estimator admits one (`score_target`)
    and E has at least three prompts and was sampled by the policy itself, else "none".

    On the policy's own samples ridge was never worse than the alternatives (benchmarks/RESULTS.md); on
    samples of a distant policy, where Q is divided by small ratios, it can be.
    """
    if entropy.baseline != "auto":
        return entropy
    placed = entropy.integrand == "rao_blackwell" and entropy.clip is None and own_samples
    enough = len(batch.prompt_N.unique()) >= LEAST_PROMPTS
    return entropy._replace(baseline="ridge" if placed and enough else "none")


def baseline(
    kind: Baseline,
    batch: Batch,
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
    prefix: TokenStats | None = None,
) -> Float[Tensor, "N R"]:
    """b_ij, nats: 0; the token's entropy h_ij; the mean of Q at position j over other prompts; or ridge
    regression of Q on `prefix_features`, cross-fitted by prompt.

    `prefix` are the statistics from which entropy and features are taken, those of the policy's tokens
    where another observable has the entropy's place in `stats`.

    Raises InputError if the estimator admits no baseline (`score_target`), for "ridge" with fewer than
    three prompts, and for "auto" (see `resolve`).
    """
    if kind == "auto":
        raise InputError(
            'baseline = "auto" is not resolved: call resolve() first, or set "none", "ridge", ...'
        )
    target_NR = score_target(stats, mask_NR, entropy, log_ratio_NR)
    if kind == "none":
        return torch.zeros_like(target_NR)
    prefix = stats if prefix is None else prefix
    if kind == "entropy":
        return prefix.entropy_NR * mask_NR
    if kind == "position":
        return position_mean(target_NR, mask_NR, batch.prompt_N)
    # The factor of Q - b in the derivative; equal for all tokens of the policy's own samples.
    _, q_NR = estimators.gradient_coefficients(stats, mask_NR, entropy, log_ratio_NR)
    enters_NR = q_NR * _token_ratio(mask_NR, entropy, log_ratio_NR)
    features = prefix_features(batch, prefix, mask_NR)
    return ridge(target_NR, mask_NR, batch.prompt_N, features, enters_NR.square())


def score_target(
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> Float[Tensor, "N R"]:
    """Q_ij: the factor of rho_ij l'_ij in the derivative, relative to the weight of h'_ij.

    On the policy's own samples, per-decision weights: sum over k > j of h_ik - R. Raises InputError
    for the sampled integrand and for clipped weights, whose expectations a baseline would change.
    """
    if entropy.integrand == "sampled":
        raise InputError(
            'integrand = "sampled" admits no baseline: set integrand = "rao_blackwell", or '
            'baseline = "none"'
        )
    if entropy.clip is not None:
        raise InputError(
            f"clip = {entropy.clip}: clipped importance weights admit no baseline: remove the clip, or "
            'set baseline = "none"'
        )
    p_NR, q_NR = estimators.gradient_coefficients(stats, mask_NR, entropy, log_ratio_NR)
    unit_NR = q_NR * _token_ratio(mask_NR, entropy, log_ratio_NR)
    return torch.where(mask_NR & (unit_NR > 0), p_NR / unit_NR.clamp(min=1e-300), 0.0)


def position_mean(
    target_NR: Float[Tensor, "N R"], mask_NR: ResponseMask, unit_N: Int[Tensor, " N"]
) -> Float[Tensor, "N R"]:
    """Mean of Q_kj over the sequences k of other sampling units that reach position j; 0 if none do."""
    _, index_N = unit_N.unique(return_inverse=True)

    def others(x_NR: Tensor) -> Tensor:
        own_MR = x_NR.new_zeros(int(index_N.max()) + 1, x_NR.shape[1]).index_add(0, index_N, x_NR)
        return x_NR.sum(0) - own_MR[index_N]

    count_NR = others(mask_NR.double())
    mean_NR = others(target_NR * mask_NR) / count_NR.clamp(min=1)
    return torch.where(mask_NR & (count_NR > 0), mean_NR, 0.0)


def controlled_tangent(
    tangent: TokenStats,
    baseline_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> TokenStats:
    """(l', h' - rho l' b): the tangent that `estimators.first_order` takes."""
    rho_NR = _token_ratio(mask_NR, entropy, log_ratio_NR)
    return tangent._replace(
        entropy_NR=tangent.entropy_NR - rho_NR * tangent.logp_NR * baseline_NR * mask_NR
    )


def controlled_stats(
    stats: TokenStats,
    moved: TokenStats,
    baseline_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> TokenStats:
    """(l, h - control variate) at theta': the `moved` that `estimators.measured_change` takes."""
    rho_NR = _token_ratio(mask_NR, entropy, log_ratio_NR)
    step_NR = (moved.logp_NR - stats.logp_NR) * mask_NR
    sign = _sign(entropy)
    control_NR = sign * rho_NR * torch.expm1(sign * step_NR) * baseline_NR
    return moved._replace(entropy_NR=moved.entropy_NR - control_NR)


def controlled_second(
    tangent: TokenStats,
    second: TokenStats,
    baseline_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> TokenStats:
    """(l'', h'' - rho (l'' + s l'^2) b), s = 1 for per-decision and -1 for sequence weights.

    The second derivative of `controlled_stats`, which `second_order.second_order` takes.
    """
    rho_NR = _token_ratio(mask_NR, entropy, log_ratio_NR)
    control_NR = rho_NR * (second.logp_NR + _sign(entropy) * tangent.logp_NR.square())
    return second._replace(entropy_NR=second.entropy_NR - control_NR * baseline_NR * mask_NR)


def controlled_coefficients(
    coefficients: tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]],
    baseline_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """(p - q rho b, q) from (p, q) of `estimators.gradient_coefficients`: those with baseline b."""
    p_NR, q_NR = coefficients
    return p_NR - q_NR * _token_ratio(mask_NR, entropy, log_ratio_NR) * baseline_NR, q_NR


def _token_ratio(mask_NR: ResponseMask, entropy: Entropy, log_ratio_NR: Tensor | None) -> Tensor:
    """rho_ij where the weight of position j does not include token j, else 1."""
    if log_ratio_NR is None or entropy.weights == "sequence":
        return torch.ones(mask_NR.shape, dtype=torch.float64)
    return (log_ratio_NR * mask_NR).exp()


def _sign(entropy: Entropy) -> float:
    """+1 for the control variate exp(r) - 1, -1 for 1 - exp(-r)."""
    return 1.0 if entropy.weights == "per_decision" else -1.0
