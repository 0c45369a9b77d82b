"""What each score is exact for: derivatives of the entropy of a tabular softmax, by autograd.

A context's logits are free parameters; the oracle never forms the scores' formulas.
"""

import pytest
import torch
from torch import Tensor

from funcprobe import InputError, TokenStats
from funcprobe.attribution import proxies

# The probabilities of five tokens are count / 20: a sample of 20 tokens can have them exactly.
COUNTS = torch.tensor([9, 5, 3, 2, 1])
P = COUNTS.double() / COUNTS.sum()
LOGITS = P.log() + 0.7
ADVANTAGE = torch.tensor([0.9, -1.3, 0.2, 2.1, -0.4], dtype=torch.float64)

# Sums of at most 20 terms of order one, twice differentiated by autograd: rounding alone.
ROUNDING = {"rtol": 1e-12, "atol": 1e-14}


def entropy(logits_V: Tensor) -> Tensor:
    logp_V = logits_V.log_softmax(-1)
    return -(logp_V.exp() * logp_V).sum()


def slope(direction_V: Tensor, logits_V: Tensor = LOGITS) -> Tensor:
    """d/d eta of the entropy along a direction of the logits."""
    return torch.func.jvp(entropy, (logits_V,), (direction_V,))[1]


def gradient(token: int, logits_V: Tensor = LOGITS) -> Tensor:
    """Of the token's log-probability in the logits."""
    return torch.func.grad(lambda z: z.log_softmax(-1)[token])(logits_V)


def each_token(logits_V: Tensor = LOGITS) -> TokenStats:
    """One sequence in which every token of the vocabulary stands once, all in the one context."""
    logp_V = logits_V.log_softmax(-1)
    return TokenStats(logp_V[None], entropy(logits_V).expand(1, len(logp_V)))


def in_proportion() -> tuple[TokenStats, Tensor]:
    """20 tokens that one context gives exactly in proportion to P, and their advantages."""
    token_T = torch.arange(5).repeat_interleave(COUNTS)
    stats = TokenStats(P.log()[token_T].view(4, 5), entropy(LOGITS).expand(4, 5))
    return stats, ADVANTAGE[token_T].view(4, 5)


def everything(like: Tensor) -> Tensor:
    return torch.ones(like.shape, dtype=torch.bool)


def test_tabular_is_the_change_by_one_tokens_gradient():
    stats = each_token()
    S = P * (P.log() + entropy(LOGITS))
    found = proxies.tabular(stats, (P * S).sum().expand(1, 5), ADVANTAGE[None], everything(S[None]))
    expected = torch.stack([slope(ADVANTAGE[k] * gradient(k)) for k in range(5)])
    torch.testing.assert_close(found[0], expected, **ROUNDING)


def test_own_logit_is_the_change_by_the_tokens_own_logit_alone():
    found = proxies.own_logit(each_token(), ADVANTAGE[None], everything(ADVANTAGE[None]))
    own = torch.eye(5, dtype=torch.float64)
    expected = torch.stack([slope(ADVANTAGE[k] * gradient(k) * own[k]) for k in range(5)])
    torch.testing.assert_close(found[0], expected, **ROUNDING)
    whole = torch.stack([slope(ADVANTAGE[k] * gradient(k)) for k in range(5)])
    ratio = whole / found[0]
    assert ratio.max() - ratio.min() > 1  # so that the score is no multiple of the exact change


def test_own_logit_is_half_of_the_change_for_two_tokens():
    logits = torch.tensor([0.3, -1.1], dtype=torch.float64)
    advantage = torch.tensor([1.7, -0.6], dtype=torch.float64)
    found = proxies.own_logit(each_token(logits), advantage[None], everything(advantage[None]))
    expected = torch.stack([slope(advantage[k] * gradient(k, logits), logits) for k in range(2)])
    torch.testing.assert_close(2 * found[0], expected, **ROUNDING)


def test_own_logit_ratio_is_own_logit_over_the_probability():
    given = each_token(), ADVANTAGE[None], everything(ADVANTAGE[None])
    torch.testing.assert_close(
        proxies.own_logit_ratio(*given)[0] * P, proxies.own_logit(*given)[0], **ROUNDING
    )


def test_surprisal_is_the_change_by_one_tokens_natural_gradient():
    found = proxies.surprisal(each_token(), ADVANTAGE[None], everything(ADVANTAGE[None]))
    fisher = sum(P[k] * torch.outer(gradient(k), gradient(k)) for k in range(5))
    natural = torch.linalg.pinv(fisher, rcond=1e-10)  # its null space shifts every logit alike
    expected = torch.stack([slope(ADVANTAGE[k] * natural @ gradient(k)) for k in range(5)])
    # The pseudo-inverse of a matrix of condition about 20.
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("score", [proxies.covariance, proxies.surprisal])
def test_mean_in_one_context_is_the_change_by_natural_policy_gradient(score):
    stats, advantage_NR = in_proportion()
    found = score(stats, advantage_NR, everything(advantage_NR)).mean()
    torch.testing.assert_close(found, slope(ADVANTAGE), **ROUNDING)


def test_discriminator_in_one_context_is_the_change_by_one_tokens_gradient():
    stats, advantage_NR = in_proportion()
    found = proxies.discriminator(stats, advantage_NR, everything(advantage_NR)).flatten()
    each = torch.stack([slope(ADVANTAGE[k] * gradient(k)) for k in range(5)])
    torch.testing.assert_close(found, each.repeat_interleave(COUNTS), **ROUNDING)


def test_quadrants_have_the_sign_of_their_corner_and_the_order_of_surprisal():
    logp = torch.tensor([[-0.1, -3.0, -1.0, -0.2, -2.0, -0.7, -5.0]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 6 + [False]])
    found = proxies.quadrant(TokenStats(logp, logp), advantage, mask)
    expected = torch.tensor([[-1 / 3, 1 / 3, 0, 1 / 4, -1 / 4, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_tokens_of_equal_surprisal_have_the_same_score():
    logp = torch.tensor([[-1.0, -2.0, -2.0, -3.0]], dtype=torch.float64)
    found = proxies.quadrant(TokenStats(logp, logp), torch.ones_like(logp), everything(logp))
    expected = torch.tensor([[-3 / 8, 0.0, 0.0, 3 / 8]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.mark.parametrize("name", proxies.PROXIES)
def test_tokens_outside_the_mask_neither_score_nor_count(name):
    stats, advantage_NR = in_proportion()
    mask_NR = everything(advantage_NR).clone()
    mask_NR[:, 3:] = False
    found = proxies.PROXIES[name](stats, advantage_NR, mask_NR)
    alone = proxies.PROXIES[name](
        TokenStats(*(x[:, :3] for x in stats)), advantage_NR[:, :3], mask_NR[:, :3]
    )
    torch.testing.assert_close(found[:, :3], alone, rtol=0, atol=0)
    assert not bool(found[:, 3:].any())
    assert bool(found.any())


@pytest.mark.parametrize("name", ["covariance", "discriminator"])
def test_no_token_is_rejected(name):
    stats, advantage_NR = in_proportion()
    with pytest.raises(InputError, match="no token of U is counted"):
        proxies.PROXIES[name](stats, advantage_NR, torch.zeros_like(everything(advantage_NR)))
