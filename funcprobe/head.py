"""Hidden states -> (log-probability, entropy) of every response token, a chunk of tokens at a time.

No [T, V] tensor of a whole microbatch is made: logits exist for `CHUNK` tokens at once.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .policy import Forward
from .types import Params

CHUNK = 256  # tokens; measured at a vocabulary of 151,936, larger chunks buy little time


def token_head(
    params: Params,
    hidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    forward: Forward,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """l = log p(target), h = -sum_u p(u) log p(u), nats, in float32 at least.

    Differentiable any number of times, in reverse and forward mode.
    """
    logits_TV = forward.logits(params, hidden_TD)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    logp_TV = torch.log_softmax(logits_TV, dim=-1)
    logp_T = logp_TV.gather(-1, target_T.to(logp_TV.device)[:, None]).squeeze(-1)
    return logp_T, -(logp_TV.exp() * logp_TV).sum(-1)


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most CHUNK that cover range(count)."""
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))
