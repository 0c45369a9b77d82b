"""Importance weights of prefixes, and the sums in the entropy estimators, on arrays [N, R].

`Entropy.weights` determines which tokens the weight of a position includes; `Entropy.per` determines
the groups of the sums, and whether a response counts beyond its end.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..types import Entropy, ResponseMask, TokenStats


def integrand(stats: TokenStats, mask_NR: ResponseMask, entropy: Entropy) -> Float[Tensor, "N R"]:
    """z = h (Rao-Blackwell) or -l (sampled); of tangents, its derivative."""
    z_NR = stats.entropy_NR if entropy.integrand == "rao_blackwell" else -stats.logp_NR
    return z_NR * mask_NR


def importance_weights(
    log_ratio_NR: Float[Tensor, "N R"] | None, mask_NR: ResponseMask, entropy: Entropy
) -> Float[Tensor, "N R"]:
    """W_ik = exp(sum of the log-ratios in the weight of k), at most `clip`; per token, 0 past the end.

    Per sequence a response keeps, past its end, the weight of all its tokens.
    """
    if log_ratio_NR is None:
        log_ratio_NR = torch.zeros(mask_NR.shape, dtype=torch.float64)
    weight_NR = prefix_sum(log_ratio_NR * mask_NR, entropy).exp()
    if entropy.clip is not None:
        weight_NR = weight_NR.clamp(max=entropy.clip)
    return weight_NR * (mask_NR if entropy.per == "token" else torch.ones_like(mask_NR))


def responsive(weight_NR: Float[Tensor, "N R"], entropy: Entropy) -> Float[Tensor, "N R"]:
    """The weights that vary with the policy: 0 for those at the clip, whose derivative is 0."""
    return weight_NR if entropy.clip is None else weight_NR * (weight_NR < entropy.clip)


def prefix_sum(x_NR: Float[Tensor, "N R"], entropy: Entropy) -> Float[Tensor, "N R"]:
    """Sum of x_j over the tokens in the weight of k: all, j < k (Rao-Blackwell), j <= k (sampled)."""
    if entropy.weights == "sequence":
        return x_NR.sum(1, keepdim=True).expand_as(x_NR)
    inclusive_NR = x_NR.cumsum(1)
    if entropy.integrand == "sampled":
        return inclusive_NR
    return torch.cat([torch.zeros_like(x_NR[:, :1]), inclusive_NR[:, :-1]], dim=1)


def prefix_sum_transposed(y_NR: Float[Tensor, "N R"], entropy: Entropy) -> Float[Tensor, "N R"]:
    """For each j, the sum of y_k over the positions k whose weight includes j."""
    if entropy.weights == "sequence":
        return y_NR.sum(1, keepdim=True).expand_as(y_NR)
    suffix_NR = y_NR.flip(1).cumsum(1).flip(1)
    if entropy.integrand == "sampled":
        return suffix_NR
    return torch.cat([suffix_NR[:, 1:], torch.zeros_like(y_NR[:, :1])], dim=1)


def by_group(x_NR: Float[Tensor, "N R"], entropy: Entropy) -> Float[Tensor, "N g"]:
    """A sequence's contribution to every group: its sum (per token), or its entry at each position."""
    return x_NR.sum(1, keepdim=True) if entropy.per == "token" else x_NR


def by_unit(x_N: Float[Tensor, "N ..."], unit_N: Int[Tensor, " N"]) -> Float[Tensor, "M ..."]:
    """Sums over the sequences of each sampling unit, in ascending order of the units' indices."""
    units, index_N = unit_N.unique(return_inverse=True)
    return x_N.new_zeros(len(units), *x_N.shape[1:]).index_add(0, index_N, x_N)
