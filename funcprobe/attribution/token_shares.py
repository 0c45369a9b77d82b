"""A sum over response tokens, and the same by sequence and by prompt."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from ..statistics.weights import by_unit
from ..types import Batch, TokenStats, UpdateBatch


class TokenShares(NamedTuple):
    """What every token adds, 0 past a response's end, and its sums; each level has the same total."""

    token_NR: Float[Tensor, "N R"]
    sequence_N: Float[Tensor, " N"]
    prompt_M: Float[Tensor, " M"]
    prompt_index_M: Int[Tensor, " M"]  # of `Batch.prompt_N`, ascending

    @property
    def total(self) -> float:
        return float(self.sequence_N.sum())


def token_shares(token_NR: Float[Tensor, "N R"], batch: Batch) -> TokenShares:
    """Sums over the tokens [N, R] of every sequence and of every prompt, in the tokens' unit."""
    sequence_N = token_NR.sum(1)
    return TokenShares(
        token_NR, sequence_N, by_unit(sequence_N, batch.prompt_N), batch.prompt_N.unique()
    )


def update_shares(update: UpdateBatch, along: TokenStats) -> TokenShares:
    """c_mk l'_mk + d_mk h'_mk = <mu, Y_mk> of every token of U, with l', h' its tangents along mu.

    Y_mk is the token's part of Y = grad J, so that they sum to <mu, Y>; c and d, and the divisors in
    them, are fixed. With mu = P X they are shares of the prediction, in its unit per unit of eta.
    """
    token_NR = update.coef_NR * along.logp_NR
    if update.entropy_coef_NR is not None:
        token_NR = token_NR + update.entropy_coef_NR * along.entropy_NR
    return token_shares(token_NR, update.batch)
