"""Scores of update tokens that papers derive for a tabular softmax: "how does it change the entropy".

Each is a predicted change of entropy in a unit of its own, negative where the token lowers it, so
that signs and ranks compare with exact shares (`update_shares`). l is the token's log-probability,
p = exp l, h the entropy of the whole next-token distribution there, A the advantage. The derivations
share four assumptions: the logits z of a context are parameters of their own, so that no token moves
another context; the step is one of plain or natural gradient ascent, without Adam's preconditioner;
without momentum; and prefixes keep their probabilities. With S_i = p_i (h + log p_i) the first-order
change of the entropy of one context is then exactly

    dH = - sum_i S_i dz_i

and every score but `quadrant` is that sum for some dz, alone or in the mean. Arrays [N, R], float64; 0
where `mask_NR` is False.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..types import InputError, ResponseMask, TokenStats

Score: TypeAlias = Float[Tensor, "N R"]
"""Of every token, negative where it is predicted to lower the entropy; 0 outside the mask."""

Proxy: TypeAlias = Callable[[TokenStats, Float[Tensor, "N R"], ResponseMask], Score]
"""A score from U's statistics at theta, the advantages of its tokens, and the tokens that J counts."""


def covariance(stats: TokenStats, advantage_NR: Float[Tensor, "N R"], mask_NR: ResponseMask) -> Score:
    """-(l - mean l) (A - mean A), means over the tokens of the batch.

    Its mean is the negative covariance of log-probability and advantage: dH / d eta for dz_i = eta A_i,
    one step of natural policy gradient, if all tokens come from one context in proportion to p. Cui et
    al., arXiv:2505.22617, who clip or penalise the tokens where it is most negative (Clip-Cov, KL-Cov).
    """
    l_NR, A_NR = (_centred(x_NR, mask_NR) for x_NR in (stats.logp_NR, advantage_NR))
    return -l_NR * A_NR


def own_logit(stats: TokenStats, advantage_NR: Float[Tensor, "N R"], mask_NR: ResponseMask) -> Score:
    """-A p (1 - p) (l + h): exact if the gradient of A l moves the token's own logit alone.

    dz is A (1 - p) at the token and 0 elsewhere, whereas A l moves the other logits by -A p_i: with two
    tokens in the vocabulary the change along the whole gradient is twice this, with more no fixed
    multiple. STEER, arXiv:2510.10150.
    """
    p_NR = stats.logp_NR.exp()
    score_NR = -advantage_NR * p_NR * (1 - p_NR) * (stats.logp_NR + stats.entropy_NR)
    return _masked(score_NR, mask_NR)


def own_logit_ratio(
    stats: TokenStats, advantage_NR: Float[Tensor, "N R"], mask_NR: ResponseMask
) -> Score:
    """-A (1 - p) (l + h): `own_logit` over the sampler's p, here the p at theta.

    What the code published with STEER computes (zz-haooo/STEER, `compute_token_weights`); it takes the
    absolute value for its weights.
    """
    score_NR = -advantage_NR * (1 - stats.logp_NR.exp()) * (stats.logp_NR + stats.entropy_NR)
    return _masked(score_NR, mask_NR)


def discriminator(
    stats: TokenStats, advantage_NR: Float[Tensor, "N R"], mask_NR: ResponseMask
) -> Score:
    """-A (S - mean S), S = p (h + l), the mean over the tokens of the batch.

    That mean stands in for the mean over the vocabulary in `tabular`, and equals it if all tokens come
    from one context in proportion to p. S of arXiv:2602.03392, whose Clip_B compares it with its mean
    over the batch.
    """
    S_NR = stats.logp_NR.exp() * (stats.entropy_NR + stats.logp_NR)
    return _masked(-advantage_NR * _centred(S_NR, mask_NR), mask_NR)


def surprisal(stats: TokenStats, advantage_NR: Float[Tensor, "N R"], mask_NR: ResponseMask) -> Score:
    """-A (l + h), the advantage times how much more surprising the token is than the mean one there.

    Exact for one token's step of natural gradient, dz = A / p at the token, in the Fisher metric of its
    context. Its mean over samples of one context is that of `covariance`.
    """
    return _masked(-advantage_NR * (stats.logp_NR + stats.entropy_NR), mask_NR)


def quadrant(stats: TokenStats, advantage_NR: Float[Tensor, "N R"], mask_NR: ResponseMask) -> Score:
    """sign(A) (r - 1/2), r in (0, 1) the rank of -l among the tokens whose advantages have that sign.

    Positive where a surprising token is rewarded or a likely one punished, negative in the other two
    quadrants of advantage and surprisal. STARE, arXiv:2606.19236, has sets and not a score: it weights
    the tokens of highest surprisal of either sign (hp-luo/STARE). The rank is the order by which they
    are taken, centred so that the quadrants meet at 0; a sign alone does not order tokens.
    """
    score_NR = torch.zeros_like(stats.logp_NR)
    for sign in (1.0, -1.0):
        of_sign_NR = mask_NR & (advantage_NR * sign > 0)
        rank_T = _ranks(-stats.logp_NR[of_sign_NR])
        score_NR[of_sign_NR] = sign * ((rank_T + 0.5) / max(len(rank_T), 1) - 0.5)
    return score_NR


PROXIES: dict[str, Proxy] = {
    "covariance": covariance,
    "own_logit": own_logit,
    "own_logit_ratio": own_logit_ratio,
    "discriminator": discriminator,
    "surprisal": surprisal,
    "quadrant": quadrant,
}
"""The scores that need no more than U's statistics, by name."""


def tabular(
    stats: TokenStats,
    expected_NR: Float[Tensor, "N R"],
    advantage_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
) -> Score:
    """-A (S - sum_i p_i S_i), S_i = p_i (h + log p_i): exact for one token's plain gradient.

    dz_i = A (1[i is the token] - p_i), the gradient of A l, so that this is what all of the above
    approximate and what rule "sgd" gives for a tabular policy. `expected_NR` is sum_i p_i S_i, which
    needs the whole distribution, in nats. Theorem 3.3 of arXiv:2602.03392; Clip_V there.
    """
    S_NR = stats.logp_NR.exp() * (stats.entropy_NR + stats.logp_NR)
    return _masked(-advantage_NR * (S_NR - expected_NR), mask_NR)


def _masked(x_NR: Tensor, mask_NR: ResponseMask) -> Score:
    return torch.where(mask_NR, x_NR, 0.0)


def _centred(x_NR: Tensor, mask_NR: ResponseMask) -> Tensor:
    if not bool(mask_NR.any()):
        raise InputError("no token of U is counted: scores of its tokens need at least one")
    return _masked(x_NR - x_NR[mask_NR].mean(), mask_NR)


def _ranks(x_T: Tensor) -> Tensor:
    """Ranks from 0, ascending; equal values share their mean rank."""
    _, inverse_T, count_U = x_T.unique(return_inverse=True, return_counts=True)
    last_U = count_U.cumsum(0) - 1
    rank_U: Tensor = (last_U - (count_U - 1) / 2).to(x_T.dtype)
    return rank_U[inverse_T]
