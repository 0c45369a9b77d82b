"""Errors by random blocks of sampling units, where only a block's contribution is known."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .estimators import require_two
from .evaluation import Evaluation
from .weights import by_group, by_unit, importance_weights, integrand

BLOCKS = 16  # a standard error from K blocks is known to 1 / sqrt(2 (K - 1)), here 18 %


def random_blocks(
    unit_N: Int[Tensor, " N"], generator: torch.Generator, count: int = BLOCKS
) -> Int[Tensor, " N"]:
    """The block, 0 to K - 1, of every sequence: `count` blocks of whole units, or as many as units.

    Blocks differ by at most one unit in size. Raises InputError for fewer than two units.
    """
    units, index_N = unit_N.unique(return_inverse=True)
    order_M = torch.randperm(require_two(len(units)), generator=generator)
    return (order_M % min(count, len(units)))[index_N]


def block_influence(
    at: Evaluation, share_Kx: Float[Tensor, "K ..."], block_N: Int[Tensor, " N"]
) -> Float[Tensor, "K ..."]:
    """Influence values of E's blocks on sums s = sum_b s_b, s_b = <X_b, mu>; they sum to 0.

    The derivative along mu is sum_n s_n, and a unit n has the influence value

        psi_n = s_n - s d_n / D - (D' / D) (n_n - R d_n) / D,    R = N / D

    n and d what it adds to N and D of the estimator. D' along mu needs the tangents of E along mu, and
    its term is left out: D' / D is a mean of scores, of expectation 0, so that the term is smaller than
    the others by one over the root of the number of units. With a group g for every position the second
    term is sum_g s_g d_ng / D_g, and s_g is not known by mu: the groups are taken by their parts of the
    entropy, which is exact on the policy's own samples, where d_ng / D_g is 1 / N.
    """
    weight_NR = importance_weights(at.log_ratio_NR, at.mask_NR, at.entropy)
    z_NR = integrand(at.stats, at.mask_NR, at.entropy)
    n_Ng, d_Ng = (by_group(x_NR, at.entropy) for x_NR in (weight_NR * z_NR, weight_NR))
    D_g = d_Ng.sum(0)
    entropy_g = n_Ng.sum(0) / D_g
    divisor_K = by_unit(d_Ng / D_g @ (entropy_g / entropy_g.sum()), block_N)
    s_x = share_Kx.sum(0)
    return share_Kx - divisor_K.view(-1, *[1] * s_x.dim()) * s_x
