"""The tests of who sampled: means of exactly 0 by enumeration, alarms where they are due, none else."""

import math
from itertools import product

import pytest
import torch

from funcprobe import TokenStats, sampler_checks
from funcprobe.statistics.sampler import ratio_drift
from support.policies import random_batch


def logits(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def test_drifts_have_mean_0_over_all_sequences_and_the_chi_square_where_the_sampler_is_another():
    """Every sequence of two of three tokens; the second token's distribution depends on the first."""
    p_first, q_first = (logits(3, seed=s).log_softmax(0) for s in (1, 2))
    p_second, q_second = (logits(3, 3, seed=s).log_softmax(1) for s in (3, 4))
    mask = torch.ones(1, 2, dtype=torch.bool)
    under_q, under_p, entropic = 0.0, 0.0, 0.0
    for a, b in product(range(3), repeat=2):
        logp = torch.stack([p_first[a], p_second[a, b]])[None]
        s = torch.stack([q_first[a], q_second[a, b]])[None]
        h = torch.stack([-(x.exp() * x).sum() for x in (p_first, p_second[a])])[None]
        stats = TokenStats(logp, h)
        chance_q, chance_p = float(s.sum().exp()), float(logp.sum().exp())
        under_q += chance_q * ratio_drift(stats, s, mask).mean
        under_p += chance_p * ratio_drift(stats, s, mask).mean
        entropic += chance_p * float((stats.logp_NR + stats.entropy_NR).sum())
    assert abs(under_q) < 1e-12  # sums of nine terms of order 1
    assert abs(entropic) < 1e-12
    chi_square = (p_first.exp() ** 2 / q_first.exp()).sum() - 1
    later = (p_second.exp() ** 2 / q_second.exp()).sum(1) - 1
    assert under_p == pytest.approx(float(chi_square + (p_first.exp() * later).sum()), rel=1e-12)


def drawn(seed, sampler, stated, count=200, length=20, vocabulary=25, scale=2.0):
    """Responses of tokens in 50 contexts, drawn by `sampler`, with log-probabilities `stated`."""
    draw = torch.Generator().manual_seed(seed)
    logits_SV = logits(50, vocabulary, seed=seed, scale=scale)
    drawn_SV = sampler(logits_SV).log_softmax(1)
    context_NR = torch.randint(50, (count, length), generator=draw)
    chances = drawn_SV.exp()[context_NR].flatten(0, 1)
    token_NR1 = torch.multinomial(chances, 1, generator=draw).view(count, length, 1)

    def of_tokens(logp_SV):
        return logp_SV[context_NR].gather(-1, token_NR1)[..., 0]

    logp_SV = logits_SV.log_softmax(1)
    h_NR = -(logp_SV.exp() * logp_SV).sum(1)[context_NR]
    batch = random_batch([(i % 5, 2, length) for i in range(count)])
    return batch, TokenStats(of_tokens(logp_SV), h_NR), of_tokens(stated(logits_SV, drawn_SV))


def policy(logits_SV):
    return logits_SV


def off_policy(by):
    return lambda logits_SV: logits_SV + by * logits(*logits_SV.shape, seed=99)


def top_k(count):
    def cut(logits_SV):
        least = logits_SV.topk(count, 1).values[:, -1:]
        return logits_SV.masked_fill(logits_SV < least, -math.inf)

    return cut


def processed(_, drawn_SV):
    return drawn_SV


def rounded(_, drawn_SV):
    return drawn_SV.bfloat16().double()


def raw(temperature):
    """The policy's own at `temperature`, in units of the temperature of sampling."""
    return lambda logits_SV, _: (logits_SV * temperature).log_softmax(1)


@pytest.mark.parametrize(
    ("sampler", "stated"),
    [
        (policy, processed),
        (policy, rounded),
        (off_policy(0.1), processed),
        (off_policy(0.1), rounded),
        (off_policy(0.5), processed),
        (off_policy(1.0), processed),
    ],
    ids=["own", "bfloat16", "off by 0.1", "off by 0.1, bfloat16", "off by 0.5", "off by 1"],
)
@pytest.mark.parametrize("scale", [2.0, 6.0])  # entropies of 1.9 and 0.5 nats
def test_no_alarm_where_log_probabilities_are_the_samplers(sampler, stated, scale):
    for seed in range(8):  # P(|z| > 4) = 6e-5 for each
        found = sampler_checks.sampler_logp_is_its_own(*drawn(seed, sampler, stated, scale=scale))
        assert found.passed, found.saw


@pytest.mark.parametrize(
    ("sampler", "stated", "sign"),
    [
        (policy, raw(0.7), 1),
        (policy, raw(0.85), 1),
        (policy, raw(1.5), 1),
        (off_policy(0.1), raw(0.7), 1),
        (policy, lambda z, _: off_policy(0.5)(z).log_softmax(1), 1),  # another model's
        (top_k(8), processed, -1),
        (policy, lambda _, q: q / math.log(10), -1),  # decimal logarithms
    ],
    ids=["raw, 0.7", "raw, 0.85", "raw, 1.5", "raw, off by 0.1", "other model", "top_k", "log10"],
)
def test_alarm_where_they_are_not(sampler, stated, sign):
    for seed in range(4):
        batch, stats, sampler_logp_NR = drawn(seed, sampler, stated)
        found = sampler_checks.sampler_logp_is_its_own(batch, stats, sampler_logp_NR)
        assert not found.passed, found.saw
        assert found.advisory
        mask_NR = torch.ones_like(sampler_logp_NR, dtype=torch.bool)
        assert sign * ratio_drift(stats, sampler_logp_NR, mask_NR).mean > 0


def test_the_error_is_that_of_repeated_samples():
    """z of 400 samples: rms 1 (to 5 %: 200 of each sign); smaller below 0, by the added variance."""
    mask_NR, sums = torch.ones(40, 5, dtype=torch.bool), []
    for seed in range(400):
        _, stats, sampler_logp_NR = drawn(seed, off_policy(0.3), processed, count=40, length=5)
        sums.append(ratio_drift(stats, sampler_logp_NR, mask_NR).z)
    z = torch.tensor(sums)
    assert 0.85 < float(z[z > 0].square().mean().sqrt()) < 1.15
    assert 0.4 < float(z[z < 0].square().mean().sqrt()) < 1


def test_unseen_tokens_make_no_deficit_significant():
    """The sampler gives a token 1e-3, the policy 2e-3; none of 400 draws is that token (p = 0.67)."""
    logp, s = (torch.full((400, 1), math.log1p(-x)).double() for x in (2e-3, 1e-3))
    mask_NR = torch.ones(400, 1, dtype=torch.bool)
    found = ratio_drift(TokenStats(logp, 0 * logp), s, mask_NR)
    assert found.mean == pytest.approx(0.998 / 0.999 - 1)
    assert abs(found.z) < 1


def test_the_missing_temperature_is_named_only_where_it_is_missing():
    for stated, named in ((raw(0.7), True), (raw(0.85), False), (raw(1.5), False)):
        batch, stats, sampler_logp_NR = drawn(0, policy, stated)
        _, _, untempered_NR = drawn(0, policy, raw(0.7))  # the policy at 0.7 is that at 1, sharpened
        found = sampler_checks.sampler_logp_is_its_own(batch, stats, sampler_logp_NR)
        explained = sampler_checks.explained_by_temperature(
            found, batch, stats, stats._replace(logp_NR=untempered_NR), sampler_logp_NR
        )
        assert ("raw_logprobs" in explained.failure_means) == named
        assert ("at temperature 1" in explained.saw) == named
    passed = found._replace(passed=True)
    same = stats._replace(logp_NR=sampler_logp_NR)
    assert (
        sampler_checks.explained_by_temperature(passed, batch, stats, same, sampler_logp_NR) is passed
    )
