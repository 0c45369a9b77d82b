"""Log-probabilities and entropies of the sampled tokens: one forward in teacher forcing."""

from jaxtyping import Float
from torch import Tensor

from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS
from ..policy.rows import Rows
from ..types import Batch, Params, TokenStats
from .head import token_head
from .microbatches import per_token


def token_stats(
    params: Params, batch: Batch, forward: Forward, max_tokens: int = MAX_TOKENS
) -> TokenStats:
    """l_ik = log p(y_ik | x_i, y_i,<k) and h_ik = -sum_u p log p of every response token, nats, [N, R].

    Differentiable in `params` with torch.func or autograd; creates a graph only if `params` require
    gradients. Raises InputError if a sequence is longer than `max_tokens`.
    """

    def stats(rows: Rows) -> tuple[Tensor, Tensor]:
        return token_head(params, forward.hidden(params, rows), rows.target_T, forward)

    return TokenStats(*per_token(stats, 2, batch, max_tokens, forward))


def seq_logprobs(
    params: Params, batch: Batch, forward: Forward, max_tokens: int = MAX_TOKENS
) -> Float[Tensor, " N"]:
    """S_i = sum_k l_ik, the log-probability of each response given its prompt, nats, [N].

    Raises InputError if a sequence is longer than `max_tokens`.
    """
    return token_stats(params, batch, forward, max_tokens).logp_NR.sum(1)
