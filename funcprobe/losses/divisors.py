"""What the coefficients of a loss are divided by, found by leaving out each prompt in turn."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Coefficients: TypeAlias = tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]
"""c and d of J."""


class Divisors(NamedTuple):
    """Shares in the divisors of c and of d, and how well a divisor describes the coefficients."""

    normaliser_N: Float[Tensor, " N"]
    entropy_normaliser_N: Float[Tensor, " N"]
    residual: float  # largest, relative to the coefficients; 0: they have a common divisor


def leave_one_out(
    coefficients: Coefficients,
    prompt_N: Int[Tensor, " N"],
    without: Callable[[Bool[Tensor, " N"]], Coefficients],
) -> Divisors:
    """Shares of the prompts in the divisors of c and d, spread evenly over their sequences; sum 1.

    `without(kept_N)` are the coefficients of the loss of those sequences alone. If c is divided by a
    sum D over prompts, then without prompt m it is s_m c on the others, s_m = D / (D - D_m), and

        D_m / D = 1 - 1 / s_m,    s_m = max(1, <c, c^(-m)> / <c, c>)    over the others' tokens.

    These shares sum to k: 1 for a sum over tokens or sequences, 0 for a constant. As U has a fixed
    number M of prompts, the rest of the divisor is a share (1 - k) / M of every prompt. `residual` is
    the largest |c^(-m) - s_m c| / |s_m c|, of d likewise: not small, for instance, where the parts of a
    loss have different divisors, or micro-batches each their own.

    If all coefficients are of one prompt, its share cannot be seen, and is the mean of the others'.
    M evaluations of `without`.
    """
    prompts, group_N, size_M = torch.unique(prompt_N, return_inverse=True, return_counts=True)
    share_2M = torch.full((2, len(prompts)), torch.nan, dtype=torch.float64)
    residual = 0.0
    for m in range(len(prompts)):
        kept_N = group_N != m
        left = [x_NR[kept_N] for x_NR in coefficients]
        if not any(bool(x_nR.any()) for x_nR in left):
            continue
        for part, (x_nR, found_nR) in enumerate(zip(left, without(kept_N), strict=True)):
            if not bool(x_nR.any()):
                continue
            scale = max(1.0, float((x_nR * found_nR).sum() / x_nR.square().sum()))
            misfit = (found_nR - scale * x_nR).norm() / (scale * x_nR.norm())
            residual = max(residual, float(misfit))
            share_2M[part, m] = 1 - 1 / scale
    # Of a divisor that grows faster than the number of prompts, as its square, a share may be negative.
    share_2M = torch.stack([_summing_to_one(share_M) for share_M in share_2M])
    residual = max(residual, -float(share_2M.min()) * len(prompts))
    normaliser_N, entropy_normaliser_N = (share_2M.clamp(min=0) / size_M)[:, group_N]
    return Divisors(normaliser_N, entropy_normaliser_N, residual)


def _summing_to_one(share_M: Tensor) -> Tensor:
    """With the rest given evenly to all. NaN, a share that was not seen: the mean of the others."""
    seen_M = ~share_M.isnan()
    mean = share_M[seen_M].mean() if bool(seen_M.any()) else torch.zeros(()).double()
    filled_M = torch.where(seen_M, share_M, mean)
    return filled_M + (1 - filled_M.sum()) / len(filled_M)
