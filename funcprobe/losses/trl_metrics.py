"""What TRL logs of per-token quantities: means over processes, then over micro-batches."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..tree import f64


def logged_means(
    logged: Mapping[str, Shaped[Tensor, "N C"]],
    m_NR: Float[Tensor, "N R"],
    microbatch_N: Int[Tensor, " N"],
) -> dict[str, Float[Tensor, ""]]:
    """Of every x the mean that TRL 1.16 logs, and the extremes of those of the clipped ratios.

    The mean of x is over the tokens in the loss of a micro-batch, all processes' together, or over all
    its sequences where x is [N, 1]; then over micro-batches. `low_min` and `high_max` are the extremes
    over a micro-batch's sequences of a sequence's own mean; NaN if no sequence has a token in the loss.
    """
    steps = torch.zeros(int(microbatch_N.max()) + 1).double()

    def mean(x: Tensor) -> Tensor:
        weight = torch.ones_like(x) if x.shape[1] == 1 else m_NR
        total = steps.index_add(0, microbatch_N, (x * weight).sum(1))
        return (total / steps.index_add(0, microbatch_N, weight.sum(1)).clamp(min=1)).mean()

    def largest(x: Tensor) -> Tensor:
        each_N = x[:, 0] if x.shape[1] == 1 else (x * m_NR).sum(1) / m_NR.sum(1)
        each_N = torch.where(each_N.isnan(), -math.inf, each_N)  # a sequence without tokens in the loss
        most = (steps - math.inf).scatter_reduce(0, microbatch_N, each_N, reduce="amax")
        return torch.where(most.isinf(), math.nan, most).nanmean()

    found = {name: mean(f64(x)) for name, x in logged.items()}
    if "clip_ratio/low_mean" in logged:
        found["clip_ratio/low_min"] = 0 - largest(-f64(logged["clip_ratio/low_mean"]))
        found["clip_ratio/high_max"] = largest(f64(logged["clip_ratio/high_mean"]))
    return found
