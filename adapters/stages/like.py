"""What stored results look like, by what they are computed from: structure, shapes, dtypes."""

import torch
from torch import Tensor

from funcprobe.passes.gradients import zero_gradient
from funcprobe.types import Batch, Params, TokenStats


def like(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def like_tokens(batch: Batch) -> Tensor:
    """One number of every response token, [N, R]."""
    return like(len(batch.prompt_N), int(batch.response_length_N.max()))


def like_stats(batch: Batch) -> TokenStats:
    """Of `token_stats`, and of tangents."""
    return TokenStats(like_tokens(batch), like_tokens(batch))


def like_gradient(params: Params) -> Params:
    """Of `weighted_grad`."""
    return zero_gradient({name: t.to("meta") for name, t in params.items()})
