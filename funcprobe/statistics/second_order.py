"""Second derivative of the estimators along one direction, and the range of the first order."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..types import Entropy, InputError, ResponseMask, TokenStats
from .estimators import influence_se, ratio_derivative
from .weights import by_group, importance_weights, integrand, prefix_sum, responsive


class SecondOrder(NamedTuple):
    """Second derivative along a direction, per unit of eta squared; fields as in `FirstOrder`."""

    derivative: float
    se: float
    influence_N: Float[Tensor, " N"]
    per_sequence_N: Float[Tensor, " N"]


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

    With a, a' the sums of l', l'' over the tokens in W: N'' = sum W (z'' + 2 a z' + (a^2 + a') z),
    D'' = sum W (a^2 + a'), and R' = (N' - R D') / D. `unit_N`, standard errors and InputError as in
    `first_order`.
    """
    weight_NR = importance_weights(log_ratio_NR, mask_NR, entropy)
    z_NR, dz_NR, ddz_NR = (integrand(s, mask_NR, entropy) for s in (stats, tangent, second))
    a_NR, da_NR = (prefix_sum(s.logp_NR * mask_NR, entropy) for s in (tangent, second))
    dweight_NR = responsive(weight_NR, entropy) * a_NR
    ddweight_NR = responsive(weight_NR, entropy) * (a_NR.square() + da_NR)
    cells = (
        weight_NR * z_NR,
        weight_NR * dz_NR + dweight_NR * z_NR,
        weight_NR * ddz_NR + 2 * dweight_NR * dz_NR + ddweight_NR * z_NR,
        *(weight_NR, dweight_NR, ddweight_NR),
    )
    n_Ng, dn_Ng, ddn_Ng, d_Ng, dd_Ng, ddd_Ng = (by_group(c, entropy) for c in cells)
    N, dN, ddN, D, dD, ddD = (by_group(c, entropy).sum(0) for c in cells)
    R, dR = N / D, ratio_derivative(N, D, dN, dD)
    ddR = (ddN - R * ddD - 2 * dR * dD) / D
    r_Ng = (n_Ng - R * d_Ng) / D
    dr_Ng = (dn_Ng - R * dd_Ng - r_Ng * dD - dR * d_Ng) / D
    ddr_Ng = (ddn_Ng - R * ddd_Ng - 2 * dR * dd_Ng - r_Ng * ddD - 2 * dr_Ng * dD - ddR * d_Ng) / D
    influence_N = ddr_Ng.sum(1)
    return SecondOrder(
        derivative=float(ddR.sum()),
        se=influence_se(influence_N, unit_N),
        influence_N=influence_N,
        per_sequence_N=((ddn_Ng - R * ddd_Ng - 2 * dR * dd_Ng) / D).sum(1),
    )


def eta_star(first: float, second: float) -> float:
    """2 |first| / |second|: the eta at which the quadratic term is as large as the linear one.

    At a tenth of it the quadratic term is 10 % of the linear one. Infinite if the second derivative
    is 0.
    """
    return math.inf if second == 0 else 2 * abs(first / second)


def difference_eta(tangent: TokenStats, mask_NR: ResponseMask, dtype: torch.dtype) -> float:
    """Step e of `second_difference`: (12 eps)^(1/4) / rms_i S'_i, eps the precision of `dtype`.

    Let x = e S' be the change of a typical log-weight; the n-th derivative of the estimator is then of
    order H S'^n. In units of H S'^2, truncation e^2 H'''' / 12 is x^2 / 12 and rounding H eps / e^2 is
    eps / x^2. Their sum is smallest at x^4 = 12 eps: x = 2.3e-4 in float64 and 0.03 in float32, with
    errors of 1e-8 and 2e-4; relative to an H'' far below H S'^2 they are larger in proportion. `dtype`
    is the coarsest that the values pass through (`Forward.coarsest`). Raises InputError if no
    response's log-probability changes along the direction.
    """
    rate = float((tangent.logp_NR * mask_NR).sum(1).square().mean().sqrt())
    if not 0 < rate < math.inf:
        raise InputError(
            f"the log-probabilities change by {rate} per unit of eta, a finite number above 0 is "
            "expected: check that the direction is finite and not zero"
        )
    return float((12 * torch.finfo(dtype).eps) ** 0.25 / rate)


def second_difference(plus: float, minus: float, eta: float) -> float:
    """(delta(eta) + delta(-eta)) / eta^2 of two measured changes: estimates the second derivative.

    Odd orders cancel; the error is eta^2 H'''' / 12 from truncation and sqrt(2) sigma / eta^2 from
    rounding, sigma as in `rounding_noise`.
    """
    return (plus + minus) / eta**2


def rounding_noise(
    plus: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    minus: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    count: int,
) -> float:
    """Standard deviation of the rounding error of one measured change, the sum over `count` sequences.

    From the terms of n of them at four etas, +-eta/2 and +-eta. The even part (plus + minus) / 2 of a
    term grows as eta^2 and the odd part (plus - minus) / 2 as eta, so that even(eta/2) - even(eta)/4
    and odd(eta) - 2 odd(eta/2) are rounding errors if eta is so small that higher orders are
    negligible. Their variances are 17/32 and 5/2 of one term's. Errors of different sequences are
    independent, so that the variance of the sum is count / n times that of the n terms together.
    """
    even = [(p + m) / 2 for p, m in zip(plus, minus, strict=True)]
    odd = [(p - m) / 2 for p, m in zip(plus, minus, strict=True)]
    even_n, odd_n = even[0] - even[1] / 4, odd[1] - 2 * odd[0]
    variance = (even_n.square().sum() / (17 / 32) + odd_n.square().sum() / (5 / 2)) / 2
    return math.sqrt(float(variance) * count / len(even_n))
