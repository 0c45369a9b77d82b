"""The entropy estimators on arrays [N, R], as README.md derives them: no model in sight.

All eight estimators (per token or sequence; Rao-Blackwell or sampled integrand; per-decision or
sequence weights) are one form, a sum over groups g of ratios

    H = sum_g N_g / D_g,     N_g = sum_{ik in g} W_ik z_ik,     D_g = sum_{ik in g} W_ik

with z = h or -l and W the importance weight of a prefix. Per token there is one group, the response
tokens of the batch. Per sequence every position k is a group and all sequences are in it: past its
end a response adds z = 0 to the numerator and the weight of all its tokens to the denominator.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .types import Entropy, InputError, ResponseMask, TokenStats


class FirstOrder(NamedTuple):
    """Derivative of the entropy estimator along a direction, per unit of eta, with its errors.

    Errors are given U: over the sampling units of E. `influence_M` are the units' influence values
    (their sum is 0); `per_sequence_N` is s_n = <X_n, v> (their sum is the derivative).
    """

    derivative: float
    se: float
    se_jackknife: float
    influence_M: Float[Tensor, " M"]
    per_sequence_N: Float[Tensor, " N"]


class SecondOrder(NamedTuple):
    """Second derivative along a direction, per unit of eta squared; errors as in `FirstOrder`."""

    derivative: float
    se: float
    influence_M: Float[Tensor, " M"]  # sums to 0
    per_sequence_N: Float[Tensor, " N"]  # sums to the derivative


class Measured(NamedTuple):
    """Entropy change by self-normalised importance sampling, and how far the weights carry it."""

    delta: float  # H(theta') - H(theta), in the estimator's unit
    ess: float  # (sum w)^2 / sum w^2 of whole-response weights
    max_weight: float  # largest whole-response weight / mean weight
    clipped: int  # whole-response weights cut at `clip`


def entropy_value(
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> float:
    """H, nats per token or per sequence; `log_ratio_NR` = l(theta) - l(sampler), default 0."""
    weight_NR = _weights(_or_zero(log_ratio_NR, mask_NR), mask_NR, entropy)
    z_NR = _integrand(stats, mask_NR, entropy)
    return float((_group(weight_NR * z_NR, entropy) / _group(weight_NR, entropy)).sum())


def first_order(
    stats: TokenStats,
    tangent: TokenStats,
    mask_NR: ResponseMask,
    unit_N: Int[Tensor, " N"],
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> FirstOrder:
    """d/d eta H(theta + eta v) = sum_g (N' - R D') / D with R = N / D, at eta = 0.

    With a the prefix sum of l' that the weight W has of r: N' = sum W (z' + a z), D' = sum W a.
    `unit_N` numbers the sampling unit of every sequence. The standard error is the delta method on
    the units' (n, d, n', d'); `se_jackknife` deletes one unit at a time. Raises InputError for
    fewer than two units.
    """
    weight_NR = _weights(_or_zero(log_ratio_NR, mask_NR), mask_NR, entropy)
    z_NR = _integrand(stats, mask_NR, entropy)
    dz_NR = _integrand(tangent, mask_NR, entropy)
    a_NR = _prefix_sum(tangent.logp_NR * mask_NR, entropy)
    dweight_NR = _responsive(weight_NR, entropy) * a_NR
    cells = (weight_NR * z_NR, weight_NR, weight_NR * dz_NR + dweight_NR * z_NR, dweight_NR)
    n_Mg, d_Mg, dn_Mg, dd_Mg = (_by_unit(c, unit_N, entropy) for c in cells)
    units = len(n_Mg)
    if units < 2:
        raise InputError(f"{units} sampling unit: a standard error needs at least two prompts")

    def ratio_derivative(n: Tensor, d: Tensor, dn: Tensor, dd: Tensor) -> Tensor:
        return (dn - n / d * dd) / d

    totals = [_group(c, entropy) for c in cells]  # not of the units: their order would round
    N, D, dN, dD = totals
    R, F = N / D, ratio_derivative(N, D, dN, dD)
    influence_M = ((dn_Mg - R * dd_Mg - dD / D * (n_Mg - R * d_Mg) - F * d_Mg) / D).sum(1)
    left_out = [t - x for t, x in zip(totals, (n_Mg, d_Mg, dn_Mg, dd_Mg), strict=True)]
    jackknife_M = ratio_derivative(*left_out).sum(1)  # type: ignore[arg-type]
    p_NR, q_NR = gradient_coefficients(stats, mask_NR, entropy, log_ratio_NR)
    return FirstOrder(
        derivative=float(F.sum()),
        se=math.sqrt(units / (units - 1) * float(influence_M.square().sum())),
        se_jackknife=math.sqrt((units - 1) * float(jackknife_M.var(correction=0))),
        influence_M=influence_M,
        per_sequence_N=(p_NR * tangent.logp_NR + q_NR * tangent.entropy_NR).sum(1),
    )


def second_order(
    stats: TokenStats,
    tangent: TokenStats,
    second: TokenStats,
    mask_NR: ResponseMask,
    unit_N: Int[Tensor, " N"],
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> SecondOrder:
    """d2/d eta2 H(theta + eta v) = sum_g R'', R'' = (N'' - R D'' - 2 R' D') / D, at eta = 0.

    With a, a' the prefix sums of l', l'': N'' = sum W (z'' + 2 a z' + (a^2 + a') z), D'' = sum W (a^2
    + a'), and R' = (N' - R D') / D as in `first_order`, which see for `unit_N`, errors and the clip.
    """
    weight_NR = _weights(_or_zero(log_ratio_NR, mask_NR), mask_NR, entropy)
    z_NR, dz_NR, ddz_NR = (_integrand(s, mask_NR, entropy) for s in (stats, tangent, second))
    a_NR, da_NR = (_prefix_sum(s.logp_NR * mask_NR, entropy) for s in (tangent, second))
    dweight_NR = _responsive(weight_NR, entropy) * a_NR
    ddweight_NR = _responsive(weight_NR, entropy) * (a_NR.square() + da_NR)
    cells = (
        weight_NR * z_NR,
        weight_NR * dz_NR + dweight_NR * z_NR,
        weight_NR * ddz_NR + 2 * dweight_NR * dz_NR + ddweight_NR * z_NR,
        *(weight_NR, dweight_NR, ddweight_NR),
    )
    N, dN, ddN, D, dD, ddD = (_group(c, entropy) for c in cells)
    R, dR = N / D, (dN - N / D * dD) / D
    ddR = (ddN - R * ddD - 2 * dR * dD) / D
    n_Mg, dn_Mg, ddn_Mg, d_Mg, dd_Mg, ddd_Mg = (_by_unit(c, unit_N, entropy) for c in cells)
    units = len(n_Mg)
    if units < 2:
        raise InputError(f"{units} sampling unit: a standard error needs at least two prompts")
    r_Mg = (n_Mg - R * d_Mg) / D
    dr_Mg = (dn_Mg - R * dd_Mg - r_Mg * dD - dR * d_Mg) / D
    ddr_Mg = (ddn_Mg - R * ddd_Mg - 2 * dR * dd_Mg - r_Mg * ddD - 2 * dr_Mg * dD - ddR * d_Mg) / D
    influence_M = ddr_Mg.sum(1)
    return SecondOrder(
        derivative=float(ddR.sum()),
        se=math.sqrt(units / (units - 1) * float(influence_M.square().sum())),
        influence_M=influence_M,
        per_sequence_N=((cells[2] - R * cells[5] - 2 * dR * cells[4]) / D).sum(1),
    )


def gradient_coefficients(
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """(p, q) with X = grad of sum_ik (p_ik l_ik + q_ik h_ik), held fixed: the derivative is <X, v>.

    The score term of token j is sum over the k whose weight holds j of W_ik (z_ik - R_g) / D_g:
    per token, the entropy still to come after j, minus R for each token still to come, over D.
    """
    weight_NR = _weights(_or_zero(log_ratio_NR, mask_NR), mask_NR, entropy)
    z_NR = _integrand(stats, mask_NR, entropy)
    D_g = _group(weight_NR, entropy)
    R_g = _group(weight_NR * z_NR, entropy) / D_g
    moving_NR = _responsive(weight_NR, entropy) * (z_NR - R_g) / D_g
    score_NR = _prefix_sum_transposed(moving_NR, entropy) * mask_NR
    direct_NR = weight_NR / D_g * mask_NR
    if entropy.integrand == "sampled":
        return score_NR - direct_NR, torch.zeros_like(direct_NR)
    return score_NR, direct_NR


def measured_change(
    stats: TokenStats,
    moved: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> Measured:
    """H(theta') - H(theta) from `stats` at theta and `moved` at theta', same samples.

    With R the estimate at theta, sum W (z - R) = 0 there, so the difference is exactly
    sum_g sum [(W' - W)(z' - R) + W (z' - z)] / D': no two nearly equal entropies are subtracted,
    and theta' = theta gives 0 exactly.
    """
    start_NR = _or_zero(log_ratio_NR, mask_NR)
    step_NR = (moved.logp_NR - stats.logp_NR) * mask_NR
    weight_NR = _weights(start_NR, mask_NR, entropy)
    if entropy.clip is None:
        gain_NR = weight_NR * torch.expm1(_prefix_sum(step_NR, entropy))
    else:
        gain_NR = _weights(start_NR + step_NR, mask_NR, entropy) - weight_NR
    z_NR = _integrand(stats, mask_NR, entropy)
    dz_NR = _integrand(
        TokenStats(*(m - s for m, s in zip(moved, stats, strict=True))), mask_NR, entropy
    )
    R_g = _group(weight_NR * z_NR, entropy) / _group(weight_NR, entropy)
    change_NR = gain_NR * (z_NR + dz_NR - R_g) + weight_NR * dz_NR
    delta = float((_group(change_NR, entropy) / _group(weight_NR + gain_NR, entropy)).sum())
    whole_N = ((start_NR + step_NR) * mask_NR).sum(1).exp()
    bound = math.inf if entropy.clip is None else entropy.clip
    clipped = int((whole_N > bound).sum())
    whole_N = whole_N.clamp(max=bound)
    return Measured(
        delta=delta,
        ess=float(whole_N.sum().square() / whole_N.square().sum()),
        max_weight=float(whole_N.max() / whole_N.mean()),
        clipped=clipped,
    )


def rounding_noise(plus: tuple[float, float], minus: tuple[float, float]) -> float:
    """Standard deviation of rounding in one measured change, from four at +-eta/2 and +-eta.

    The even part (plus + minus) / 2 grows as eta^2 and the odd part (plus - minus) / 2 as eta, so
    that even(eta/2) - even(eta)/4 and odd(eta) - 2 odd(eta/2) are rounding where eta is so small that
    higher orders vanish. Their variances are 17/32 and 5/2 of that of one measurement.
    """
    even = [(p + m) / 2 for p, m in zip(plus, minus, strict=True)]
    odd = [(p - m) / 2 for p, m in zip(plus, minus, strict=True)]
    return math.sqrt(
        ((even[0] - even[1] / 4) ** 2 / (17 / 32) + (odd[1] - 2 * odd[0]) ** 2 / (5 / 2)) / 2
    )


def sum_se(t_N: Float[Tensor, " N"], unit_N: Int[Tensor, " N"]) -> float:
    """Standard error of sum_n t_n when its units are drawn independently: sqrt(M var(t_m)).

    For U: t_n = <P X, Y_n>, units are prompts. Raises InputError for fewer than two units.
    """
    t_M = _sum_by_unit(t_N[:, None], unit_N).squeeze(1)
    if len(t_M) < 2:
        raise InputError(f"{len(t_M)} sampling unit: a standard error needs at least two prompts")
    return math.sqrt(len(t_M) * float(t_M.var()))


def _or_zero(log_ratio_NR: Tensor | None, mask_NR: ResponseMask) -> Tensor:
    if log_ratio_NR is None:
        return torch.zeros(mask_NR.shape, dtype=torch.float64)
    return log_ratio_NR * mask_NR


def _integrand(stats: TokenStats, mask_NR: ResponseMask, entropy: Entropy) -> Tensor:
    z_NR = stats.entropy_NR if entropy.integrand == "rao_blackwell" else -stats.logp_NR
    return z_NR * mask_NR


def _active(mask_NR: ResponseMask, entropy: Entropy) -> Tensor:
    return mask_NR if entropy.per == "token" else torch.ones_like(mask_NR)


def _weights(log_ratio_NR: Tensor, mask_NR: ResponseMask, entropy: Entropy) -> Tensor:
    weight_NR = _prefix_sum(log_ratio_NR, entropy).exp()
    if entropy.clip is not None:
        weight_NR = weight_NR.clamp(max=entropy.clip)
    return weight_NR * _active(mask_NR, entropy)


def _responsive(weight_NR: Tensor, entropy: Entropy) -> Tensor:
    """Weights that follow the policy: one held at the clip has derivative 0."""
    return weight_NR if entropy.clip is None else weight_NR * (weight_NR < entropy.clip)


def _prefix_sum(x_NR: Tensor, entropy: Entropy) -> Tensor:
    """Which x_j enter the weight of position k: all, j < k (Rao-Blackwell), or j <= k (sampled)."""
    if entropy.weights == "sequence":
        return x_NR.sum(1, keepdim=True).expand_as(x_NR)
    inclusive_NR = x_NR.cumsum(1)
    if entropy.integrand == "sampled":
        return inclusive_NR
    return torch.cat([torch.zeros_like(x_NR[:, :1]), inclusive_NR[:, :-1]], dim=1)


def _prefix_sum_transposed(y_NR: Tensor, entropy: Entropy) -> Tensor:
    """For each j, the sum of y_k over the positions k whose weight holds j."""
    if entropy.weights == "sequence":
        return y_NR.sum(1, keepdim=True).expand_as(y_NR)
    suffix_NR = y_NR.flip(1).cumsum(1).flip(1)
    if entropy.integrand == "sampled":
        return suffix_NR
    return torch.cat([suffix_NR[:, 1:], torch.zeros_like(y_NR[:, :1])], dim=1)


def _group(x_NR: Tensor, entropy: Entropy) -> Float[Tensor, " g"]:
    return x_NR.sum().reshape(1) if entropy.per == "token" else x_NR.sum(0)


def _by_unit(x_NR: Tensor, unit_N: Int[Tensor, " N"], entropy: Entropy) -> Float[Tensor, "M g"]:
    return _sum_by_unit(x_NR.sum(1, keepdim=True) if entropy.per == "token" else x_NR, unit_N)


def _sum_by_unit(x_Ng: Tensor, unit_N: Int[Tensor, " N"]) -> Float[Tensor, "M g"]:
    units, index_N = unit_N.unique(return_inverse=True)
    return x_Ng.new_zeros(len(units), x_Ng.shape[1]).index_add(0, index_N, x_Ng)
