"""Log-probabilities and entropies of the sampled tokens: one forward in teacher forcing."""

import torch
from jaxtyping import Float
from torch import Tensor

from .head import chunks, token_head
from .layout import MAX_TOKENS, microbatches, scatter
from .policy import Forward
from .types import Batch, Params, TokenStats


def token_stats(
    params: Params, batch: Batch, forward: Forward, max_tokens: int = MAX_TOKENS
) -> TokenStats:
    """l_ik = log p(y_ik | x_i, y_i,<k) and h_ik = -sum_u p log p of every response token, nats, [N, R].

    Differentiable in `params` with torch.func or autograd; makes no graph unless asked. Raises
    InputError if a sequence is longer than `max_tokens`.
    """
    parts = microbatches(batch, max_tokens)
    logp: list[Tensor] = []
    entropy: list[Tensor] = []
    for rows in parts:
        hidden_TD = forward.hidden(params, rows)
        outs = [
            token_head(params, hidden_TD[c], rows.target_T[c], forward)
            for c in chunks(len(rows.target_T))
        ]
        logp.append(torch.cat([out[0] for out in outs]))
        entropy.append(torch.cat([out[1] for out in outs]))
    return TokenStats(scatter(logp, parts, batch), scatter(entropy, parts, batch))


def seq_logprobs(
    params: Params, batch: Batch, forward: Forward, max_tokens: int = MAX_TOKENS
) -> Float[Tensor, " N"]:
    """S_i = sum_k l_ik, the log-probability of each response given its prompt, nats, [N]."""
    return token_stats(params, batch, forward, max_tokens).logp_NR.sum(1)
