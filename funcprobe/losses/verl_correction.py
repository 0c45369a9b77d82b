"""verl's rollout correction: importance weights against the sampler, and rejected tokens.

With r = log p_current - log p_sampler of a token, detached and 0 off the mask, so that sums over a
row are those over its tokens in the mask (verl 0.9.1, verl/trainer/ppo/rollout_corr_helper.py, which
bounds exponents by +-20).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .verl_settings import VerlLoss, rejections, weight_bounds

EXPONENT = 20.0


def importance_weights(
    settings: VerlLoss,
    log_ratio_NR: Float[Tensor, "N R"],
    mask_NR: Bool[Tensor, "N R"],
    normalised_over_N: Int[Tensor, " N"],
) -> Float[Tensor, "N R"] | None:
    """Weights of `rollout_is`, [N, R], 0 off the mask; None where it is None.

        token:     w_ik = exp(r_ik)
        sequence:  w_ik = exp(sum_k r_ik)

    truncated to the upper bound; with a lower bound 0 outside both. `rollout_is_batch_normalize`
    divides by the mean over the tokens or sequences of equal `normalised_over_N`, if above 1e-8.
    """
    if settings.rollout_is is None:
        return None
    token = settings.rollout_is == "token"
    sum_NR = log_ratio_NR if token else log_ratio_NR.sum(1, keepdim=True)
    raw_NR = sum_NR.clamp(-EXPONENT, EXPONENT).exp() * mask_NR
    bounds = weight_bounds(settings)
    if bounds.lower is None:
        weight_NR = raw_NR.clamp(max=bounds.upper)
    else:
        weight_NR = torch.where((raw_NR >= bounds.lower) & (raw_NR <= bounds.upper), raw_NR, 0.0)
    if not settings.rollout_is_batch_normalize:
        return weight_NR
    scale_N = torch.ones(len(weight_NR), dtype=torch.float64)
    for batch in normalised_over_N.unique():
        rows_N = normalised_over_N == batch
        weight_nR, mask_nR = weight_NR[rows_N], mask_NR[rows_N]
        if token:
            mean = weight_nR.sum() / mask_nR.sum().clamp(min=1)
        else:
            mean = weight_nR.amax(1).sum() / mask_nR.any(1).sum().clamp(min=1)
        scale_N = torch.where(rows_N & (mean > 1e-8), 1 / mean, scale_N)
    return weight_NR * scale_N[:, None]


def kept(
    settings: VerlLoss, log_ratio_NR: Float[Tensor, "N R"], mask_NR: Bool[Tensor, "N R"]
) -> Bool[Tensor, "N R"]:
    """Which tokens all criteria of `rollout_rs` keep, [N, R].

        k1: -r between log lower and log upper,  k2: r**2 / 2 <= upper,  k3: exp(r) - 1 - r <= upper

    for the token itself (token_*), or for all tokens of a sequence by the sum, mean or maximum over
    them (seq_*).
    """
    r_NR = log_ratio_NR.clamp(-EXPONENT, EXPONENT)
    kept_NR = torch.ones_like(mask_NR)
    for criterion, bounds in rejections(settings).items():
        over, kind = criterion.removeprefix("seq_").split("_")
        divergence = {"k1": -r_NR, "k2": r_NR.square() / 2, "k3": r_NR.exp() - 1 - r_NR}[kind]
        if over != "token":
            # k2 and k3 are not negative, so that the zeros off the mask do not enter the maximum.
            reduced_N = divergence.amax(1) if over == "max" else divergence.sum(1)
            length_N = mask_NR.sum(1).clamp(min=1)
            divergence = (reduced_N / length_N if over == "mean" else reduced_N)[:, None]
        kept_NR = kept_NR & (divergence <= (math.log(bounds.upper) if kind == "k1" else bounds.upper))
        if bounds.lower is not None:
            kept_NR = kept_NR & (divergence >= math.log(bounds.lower))
    return kept_NR
