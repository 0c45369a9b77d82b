"""Shares of E's tokens, against the measured change if that token alone moves; and their errors."""

from typing import Any

import pytest
import torch

import funcprobe
from funcprobe import Entropy, InputError, TokenStats
from funcprobe.attribution.evaluation_shares import evaluation_shares
from funcprobe.statistics import evaluation
from funcprobe.statistics.intervals import delta_error
from support.estimators import each_estimator
from support.policies import random_batch

# Prompts 1 and 2 are drawn several times; one response has one token.
E = random_batch([(0, 3, 5), (1, 4, 2), (1, 4, 7), (2, 2, 1), (3, 5, 4), (2, 2, 3), (1, 4, 3)], seed=1)
MASK = funcprobe.response_mask(E)
DRAWS = torch.arange(7)


def draw(seed: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(MASK.shape, generator=generator, dtype=torch.float64) * MASK


STATS = TokenStats(-draw(1).abs(), draw(2).abs())
TANGENT = TokenStats(draw(3), draw(4) - 0.3 * MASK)
SAMPLER = STATS.logp_NR - draw(5, 0.2)


def at_theta(entropy: Entropy, sampler: bool, baseline: bool) -> funcprobe.Evaluation:
    """With a baseline of any numbers: what follows does not depend on where it is from."""
    given: dict[str, Any] = {"sampler_logp_NR": SAMPLER if sampler else None}
    if baseline and entropy.integrand == "rao_blackwell":
        return funcprobe.evaluate(
            E, STATS, entropy._replace(baseline="ridge"), baseline_NR=draw(6), **given
        )
    return funcprobe.evaluate(E, STATS, entropy, **given)


@each_estimator
@pytest.mark.parametrize("sampler", [False, True])
@pytest.mark.parametrize("baseline", [False, True])
def test_a_tokens_share_is_the_change_if_it_alone_moves(entropy, sampler, baseline):
    """d/de of the measured change, l and h of one token moved by e l', e h': central differences."""
    at = at_theta(entropy, sampler, baseline)
    found = evaluation_shares(at, TANGENT, E, DRAWS)

    def measured(e: float, part: TokenStats) -> float:
        moved = TokenStats(*(s + e * t for s, t in zip(STATS, part, strict=True)))
        return funcprobe.change(at, moved).delta

    def slope(part: TokenStats) -> float:
        return (measured(1e-5, part) - measured(-1e-5, part)) / 2e-5

    for i, k in MASK.nonzero().tolist():
        one = torch.zeros_like(TANGENT.logp_NR)
        one[i, k] = 1
        alone = TokenStats(*(one * t for t in TANGENT))
        # The differences' error is 1e-10 times third derivatives, of the size of the values.
        close = pytest.approx(slope(alone), rel=1e-7, abs=1e-9)
        assert float(found.tokens.token_NR[i, k]) == close
        direct = pytest.approx(slope(alone._replace(logp_NR=0 * one)), rel=1e-7, abs=1e-9)
        assert float(found.direct.token_NR[i, k]) == direct
    assert not found.tokens.token_NR[~MASK].any()
    whole = evaluation.derivative(at, TANGENT, DRAWS)
    assert found.tokens.total == pytest.approx(whole.derivative, rel=1e-12)
    assert found.direct.derivative == pytest.approx(float(found.direct.token_NR.sum()), rel=1e-12)
    assert found.score.derivative == pytest.approx(float(found.score.token_NR.sum()), rel=1e-12)
    with_baseline = baseline and entropy.integrand == "rao_blackwell"
    assert bool(found.control.token_NR.any()) == with_baseline
    assert bool(found.direct.token_NR.any()) == (entropy.integrand == "rao_blackwell")


def test_where_no_probability_moves_the_shares_are_the_entropies_own():
    """l' = 0: per token and on the policy's samples, h' / sum T, by a loop."""
    at = at_theta(Entropy(baseline="none"), False, False)
    still = TANGENT._replace(logp_NR=0 * TANGENT.logp_NR)
    found = evaluation_shares(at, still, E, DRAWS)
    for i, length in enumerate(E.response_length_N.tolist()):
        expected = [float(TANGENT.entropy_NR[i, k]) / 25 for k in range(length)]
        assert found.tokens.token_NR[i, :length].tolist() == pytest.approx(expected, rel=1e-12)
    assert found.score.derivative == found.control.derivative == 0
    assert found.score.error.se == 0


@each_estimator
@pytest.mark.parametrize("unit_N", [DRAWS, E.prompt_N], ids=["draws", "prompts"])
def test_errors_of_prompts_are_those_of_the_derivative_restricted_to_them(entropy, unit_N):
    """`derivative` with the tangents of all other prompts 0: its value and its influence values."""
    at = at_theta(entropy, True, True)
    found = evaluation_shares(at, TANGENT, E, unit_N)
    for m in range(4):
        own = (E.prompt_N == m)[:, None]
        alone = evaluation.derivative(at, TokenStats(*(t * own for t in TANGENT)), unit_N)
        assert float(found.tokens.prompt_M[m]) == pytest.approx(alone.derivative, rel=1e-9)
        assert float(found.prompt_se_M[m]) == pytest.approx(alone.se, rel=1e-9)


@each_estimator
def test_the_error_of_the_score_is_of_numerical_influence_values(entropy):
    """A weight for every sequence, and the derivative in it of the score, both by autograd of H."""
    at = at_theta(entropy, True, True)
    found = evaluation_shares(at, TANGENT, E, DRAWS).score
    w_N = torch.ones(7, dtype=torch.float64, requires_grad=True)
    e = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(entropy_of_weighted(at, w_N, e), e, create_graph=True)
    (influence_N,) = torch.autograd.grad(slope, w_N)
    assert found.derivative == pytest.approx(float(slope.detach()), rel=1e-12)
    assert found.error == pytest.approx(delta_error(influence_N, DRAWS), rel=1e-9)


def entropy_of_weighted(at: funcprobe.Evaluation, w_N: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """H with E's sequences weighted and l moved by e l', h fixed; written from its definition."""
    entropy, R = at.entropy, MASK.shape[1]
    log_NR = (at.log_ratio_NR + e * TANGENT.logp_NR) * MASK
    z_NR = STATS.entropy_NR
    if entropy.integrand == "sampled":
        z_NR = -(STATS.logp_NR + e * TANGENT.logp_NR)
    terms = []
    for i in range(len(MASK)):
        for k in range(R):
            own = range(R) if entropy.weights == "sequence" else range(k)
            if entropy.weights == "per_decision" and entropy.integrand == "sampled":
                own = range(k + 1)
            weight = w_N[i] * torch.exp(log_NR[i, list(own)].sum())
            terms.append((k, weight * z_NR[i, k] * MASK[i, k], weight, bool(MASK[i, k])))
    if entropy.per == "token":
        return sum(n for _, n, _, _ in terms) / sum(d for _, _, d, real in terms if real)
    by_position = []
    for k in range(R):
        here = [t for t in terms if t[0] == k]
        by_position.append(sum(t[1] for t in here) / sum(t[2] for t in here))
    return sum(by_position)


def test_one_unit_has_no_error():
    at = at_theta(Entropy(baseline="none"), False, False)
    with pytest.raises(InputError, match="at least two prompts"):
        evaluation_shares(at, TANGENT, E, torch.zeros(7, dtype=torch.long))
