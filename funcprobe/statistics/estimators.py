"""The entropy estimators on arrays [N, R], as derived in docs/mathematics.md.

All eight estimators (per token or sequence; Rao-Blackwell or sampled integrand; per-decision or
sequence weights) have one form, a sum over groups g of ratios

    H = sum_g N_g / D_g,     N_g = sum_{ik in g} W_ik z_ik,     D_g = sum_{ik in g} W_ik

with z = h or -l and W the importance weight of a prefix. Per token there is one group, the response
tokens of the batch. Per sequence every position k is a group and all sequences are in it: past its
end a response adds z = 0 to the numerator and the weight of all its tokens to the denominator.

An estimate of a derivative or a change is thus a smooth function of sums over sequences. Its standard
error is the delta method's: the root of M / (M - 1) times the sum of squares of the M sampling units'
influence values.
"""

import math
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..html_table import html_table
from ..types import Entropy, InputError, ResponseMask, TokenStats
from .weights import (
    by_group,
    by_unit,
    importance_weights,
    integrand,
    prefix_sum,
    prefix_sum_transposed,
    responsive,
)

Cells: TypeAlias = tuple[Float[Tensor, "N g"], ...]
"""Contribution of every sequence to the sums N, D, N', D', ... of every group."""


class FirstOrder(NamedTuple):
    """Derivative of the entropy estimator along a direction, per unit of eta, with standard errors.

    Errors are given U, over the sampling units of E. `influence_N` are the sequences' influence values
    (they sum to 0); `per_sequence_N` is s_n = <X_n, v> (they sum to the derivative).
    """

    derivative: float
    se: float
    se_jackknife: float
    influence_N: Float[Tensor, " N"]
    per_sequence_N: Float[Tensor, " N"]


class Measured(NamedTuple):
    """Entropy change by self-normalised importance sampling, with diagnostics of the weights.

    `influence_N` are the sequences' influence values (they sum to 0); `weight_N` the weights of whole
    responses, at most `Entropy.clip`.
    """

    delta: float  # H(theta') - H(theta), in the estimator's unit
    ess: float  # (sum w)^2 / sum w^2 of whole-response weights
    max_weight: float  # largest whole-response weight / mean weight
    clipped: int  # number of whole-response weights above `Entropy.clip`
    influence_N: Float[Tensor, " N"]
    weight_N: Float[Tensor, " N"]

    def _repr_html_(self) -> str:
        count = len(self.influence_N)
        rows = [
            ("standard error, every response a sampling unit", f"{self._se():.2g}"),
            ("effective sample size", f"{self.ess:.1f} of {count} responses"),
            ("largest weight over the mean one", f"{self.max_weight:.3g}"),
            ("weights cut off at the clip", str(self.clipped)),
        ]
        title = f"Measured change of the entropy: {self.delta:+.4g}"
        unit = "In nats per token or per sequence, as the entropy was asked for."
        return html_table(title, ("", "value"), rows, unit)

    def _se(self) -> float:
        return influence_se(self.influence_N, torch.arange(len(self.influence_N)))


def entropy_value(
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> float:
    """H, nats per token or per sequence; `log_ratio_NR` = l(theta) - l(sampler), default 0."""
    weight_NR = importance_weights(log_ratio_NR, mask_NR, entropy)
    N, D = _totals(weight_NR * integrand(stats, mask_NR, entropy), weight_NR, entropy=entropy)
    return float((N / D).sum())


def entropy_influence(
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> Float[Tensor, " N"]:
    """Influence values of `entropy_value`, sum_g (n - R d) / D; they sum to 0."""
    weight_NR = importance_weights(log_ratio_NR, mask_NR, entropy)
    cells = (weight_NR * integrand(stats, mask_NR, entropy), weight_NR)
    n_Ng, d_Ng = (by_group(c, entropy) for c in cells)
    N, D = n_Ng.sum(0), d_Ng.sum(0)
    return ((n_Ng - N / D * d_Ng) / D).sum(1)


def first_order(
    stats: TokenStats,
    tangent: TokenStats,
    mask_NR: ResponseMask,
    unit_N: Int[Tensor, " N"],
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> FirstOrder:
    """d/d eta H(theta + eta v) = sum_g (N' - R D') / D with R = N / D, at eta = 0.

    With a the sum of l' over the tokens that the weight W includes: N' = sum W (z' + a z),
    D' = sum W a. `unit_N` is the index of every sequence's sampling unit. `se` is the delta method's on
    the units' (n, d, n', d'), `se_jackknife` leaves out one unit at a time; nats per token or sequence
    and per unit of eta. Raises InputError for fewer than two units.
    """
    cells = first_order_cells(stats, tangent, mask_NR, entropy, log_ratio_NR)
    totals = tuple(c.sum(0) for c in cells)
    n_Ng, d_Ng, dn_Ng, dd_Ng = cells
    N, D, _, dD = totals
    R, F = N / D, ratio_derivative(*totals)
    influence_N = ((dn_Ng - R * dd_Ng - dD / D * (n_Ng - R * d_Ng) - F * d_Ng) / D).sum(1)
    left_out = (t - by_unit(c, unit_N) for t, c in zip(totals, cells, strict=True))
    jackknife_M = ratio_derivative(*left_out).sum(1)
    p_NR, q_NR = gradient_coefficients(stats, mask_NR, entropy, log_ratio_NR)
    return FirstOrder(
        derivative=float(F.sum()),
        se=influence_se(influence_N, unit_N),
        se_jackknife=math.sqrt((len(jackknife_M) - 1) * float(jackknife_M.var(correction=0))),
        influence_N=influence_N,
        per_sequence_N=(p_NR * tangent.logp_NR + q_NR * tangent.entropy_NR).sum(1),
    )


def first_order_cells(
    stats: TokenStats,
    tangent: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> Cells:
    """(n, d, n', d') [N, g], whose sums over sequences `ratio_derivative` takes."""
    weight_NR = importance_weights(log_ratio_NR, mask_NR, entropy)
    z_NR, dz_NR = (integrand(s, mask_NR, entropy) for s in (stats, tangent))
    dweight_NR = responsive(weight_NR, entropy) * prefix_sum(tangent.logp_NR * mask_NR, entropy)
    cells = (weight_NR * z_NR, weight_NR, weight_NR * dz_NR + dweight_NR * z_NR, dweight_NR)
    return tuple(by_group(c, entropy) for c in cells)


def ratio_derivative(N: Tensor, D: Tensor, dN: Tensor, dD: Tensor) -> Tensor:
    """(N / D)' = (N' - R D') / D of every group."""
    return (dN - N / D * dD) / D


def gradient_coefficients(
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """(p, q) with X = grad of sum_ik (p_ik l_ik + q_ik h_ik), held fixed: the derivative is <X, v>.

    The score term of token j is the sum of W_ik (z_ik - R_g) / D_g over the positions k whose weight
    includes j: per token, the entropy after j, minus R for each token after j, over D.
    """
    weight_NR = importance_weights(log_ratio_NR, mask_NR, entropy)
    z_NR = integrand(stats, mask_NR, entropy)
    N_g, D_g = _totals(weight_NR * z_NR, weight_NR, entropy=entropy)
    moving_NR = responsive(weight_NR, entropy) * (z_NR - N_g / D_g) / D_g
    score_NR = prefix_sum_transposed(moving_NR, entropy) * mask_NR
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
    """H(theta') - H(theta) from `stats` at theta and `moved` at theta', same samples, nats.

    With dN and dD the changes of the sums N and D, summed from the changes of the sequences, it is
    sum_g (dN - R dD) / (D + dD): no two nearly equal entropies are subtracted, and theta' = theta
    gives 0 exactly.
    """
    cells = measured_cells(stats, moved, mask_NR, entropy, log_ratio_NR)
    n_Ng, d_Ng, dn_Ng, dd_Ng = cells
    totals = tuple(c.sum(0) for c in cells)
    N, D, _, dD = totals
    change = ratio_change(*totals)
    own_Ng = dn_Ng - N / D * dd_Ng - (n_Ng - N / D * d_Ng) / D * dD
    influence_N = ((own_Ng - change * (d_Ng + dd_Ng)) / (D + dD)).sum(1)
    log_N = ((moved.logp_NR - stats.logp_NR) * mask_NR).sum(1)
    if log_ratio_NR is not None:
        log_N = log_N + (log_ratio_NR * mask_NR).sum(1)
    bound = math.inf if entropy.clip is None else entropy.clip
    weight_N = log_N.exp().clamp(max=bound)
    return Measured(
        delta=float(change.sum()),
        ess=float(weight_N.sum().square() / weight_N.square().sum()),
        max_weight=float(weight_N.max() / weight_N.mean()),
        clipped=int((log_N.exp() > bound).sum()),
        influence_N=influence_N,
        weight_N=weight_N,
    )


def measured_cells(
    stats: TokenStats,
    moved: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> Cells:
    """(n, d, dn, dd) [N, g], the terms of `ratio_change`: dn = W' z' - W z, dd = W' - W."""
    weight_NR = importance_weights(log_ratio_NR, mask_NR, entropy)
    step_NR = (moved.logp_NR - stats.logp_NR) * mask_NR
    if entropy.clip is None:
        gain_NR = weight_NR * torch.expm1(prefix_sum(step_NR, entropy))
    else:
        there_NR = step_NR if log_ratio_NR is None else log_ratio_NR + step_NR
        gain_NR = importance_weights(there_NR, mask_NR, entropy) - weight_NR
    z_NR = integrand(stats, mask_NR, entropy)
    gained = TokenStats(*(m - s for m, s in zip(moved, stats, strict=True)))
    dz_NR = integrand(gained, mask_NR, entropy)
    cells = (weight_NR * z_NR, weight_NR, gain_NR * (z_NR + dz_NR) + weight_NR * dz_NR, gain_NR)
    return tuple(by_group(c, entropy) for c in cells)


def ratio_change(N: Tensor, D: Tensor, dN: Tensor, dD: Tensor) -> Tensor:
    """(N + dN) / (D + dD) - N / D of every group."""
    return (dN - N / D * dD) / (D + dD)


def influence_se(influence_N: Float[Tensor, " N"], unit_N: Int[Tensor, " N"]) -> float:
    """Standard error by the delta method: sqrt(M / (M - 1) sum_m influence_m^2) over M units.

    Raises InputError for fewer than two units.
    """
    influence_M = by_unit(influence_N, unit_N)
    M = require_two(len(influence_M))
    return math.sqrt(M / (M - 1) * float(influence_M.square().sum()))


def update_influence(
    t_N: Float[Tensor, " N"], normaliser_N: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Influence values of sum_n t_n over U: t_n - (sum_n t_n) d_n / sum_n d_n; they sum to 0.

    t_n = <P X, Y_n> has the divisor of J in it, so that the sum is a ratio of sums over U's sequences,
    sum_n t_n = sum_n u_n / sum_n d_n, with d_n = `normaliser_N` up to a common factor: its derivative
    in a weight of sequence n, in numerator and divisor. With equal d_n it is t_n minus their mean.
    """
    return t_N - t_N.sum() * normaliser_N / normaliser_N.sum()


def require_two(units: int) -> int:
    """The number of sampling units. Raises InputError for fewer than two."""
    if units < 2:
        raise InputError(f"{units} sampling unit: a standard error needs at least two prompts")
    return units


def _totals(*cells_NR: Tensor, entropy: Entropy) -> list[Float[Tensor, " g"]]:
    return [by_group(c, entropy).sum(0) for c in cells_NR]
