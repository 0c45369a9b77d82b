"""The draws of sampling: one uniform number a token, and the token whose interval it lies in.

Number k of sequence i depends on the seed, i and k alone. Responses are therefore the same in batches
of any size, in any order, and split over processes in any way, up to the rounding of the logits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..config.schema import SamplingConfig


def uniforms(seed: int, indices: Sequence[int], count: int) -> Float64[Tensor, "N R"]:
    """`count` numbers in [0, 1) for each index, multiples of 2^-53: Philox with the key (seed, index).

    The raw stream, which numpy keeps from version to version, unlike the floats made of it.
    """
    rows = [np.random.Philox(key=[seed, index]).random_raw(count) >> 11 for index in indices]
    return torch.from_numpy(np.stack(rows).astype(np.float64) * 2.0**-53)


def chosen(
    logits_NV: Float[Tensor, "N V"], u_N: Float64[Tensor, " N"]
) -> tuple[Int64[Tensor, " N"], Bool[Tensor, " N"]]:
    """The first token y with P(token <= y) > u under softmax(logits); whether the logits allow one.

    One number a token instead of V, as Gumbel noise or torch.multinomial take. In float32 the weights
    exp(l - max l) have relative errors below (|l - max l| + 2) 2^-24; they are summed in float64. A
    token of weight 0 is never chosen.
    """
    weight_NV = (logits_NV - logits_NV.amax(1, keepdim=True)).exp()
    cumulative_NV = weight_NV.cumsum(1, dtype=torch.float64)
    total_N1 = cumulative_NV[:, -1:].contiguous()
    # u * total may round to the total, which no token's cumulative weight exceeds.
    most_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    target_N1 = torch.minimum(u_N[:, None] * total_N1, most_N1)
    token_N = torch.searchsorted(cumulative_NV, target_N1, right=True).squeeze(1)
    return token_N.clamp(max=logits_NV.shape[1] - 1), total_N1.squeeze(1).isfinite()


def warpers(config: SamplingConfig) -> LogitsProcessorList:
    """Temperature, then top_k, then top_p, as generate() has them; none that would change nothing."""
    found = LogitsProcessorList()
    if config.temperature != 1:
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        found.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        found.append(TopPLogitsWarper(config.top_p))
    return found


class Draws(LogitsProcessor):
    """Makes generate()'s greedy choice the drawn token: its score is 0, all others' are -inf."""

    def __init__(
        self, config: SamplingConfig, u_NR: Float64[Tensor, "N R"], prompt_tokens: int
    ) -> None:
        self.warpers = warpers(config)
        self.u_NR = u_NR
        self.prompt_tokens = prompt_tokens  # of a row, padding included
        self.finite = torch.ones((), dtype=torch.bool, device=u_NR.device)  # read once, at the end

    def __call__(
        self, input_ids: Int64[Tensor, "N L"], scores: Float[Tensor, "N V"]
    ) -> Float[Tensor, "N V"]:
        logits_NV: Tensor = self.warpers(input_ids, scores)  # type: ignore[arg-type]
        u_N = self.u_NR[:, input_ids.shape[1] - self.prompt_tokens].to(logits_NV.device)
        token_N, finite_N = chosen(logits_NV, u_N)
        self.finite = self.finite.to(finite_N.device) & finite_N.all()
        return torch.full_like(scores, -torch.inf).scatter_(1, token_N[:, None], 0.0)
