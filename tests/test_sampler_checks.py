"""The checks of who sampled a batch, on responses of independent tokens."""

import math

import pytest
import torch

import funcprobe
from funcprobe import sampler_checks
from funcprobe.checks import Check
from support.policies import random_batch


def independent_tokens(
    temperature: float, seed: int, top_k: int = 0
) -> tuple[funcprobe.Batch, funcprobe.TokenStats]:
    """E of 400 responses of 1 to 6 independent tokens, drawn at a temperature; l and h at 1."""
    generator = torch.Generator().manual_seed(seed)
    logits_V = 2 * torch.randn(30, generator=generator, dtype=torch.float64)
    drawn_V = (logits_V / temperature).softmax(0)
    if top_k:
        drawn_V = drawn_V * (drawn_V >= drawn_V.topk(top_k).values[-1])
    batch = random_batch([(i % 7, 2, 1 + i % 6) for i in range(400)])
    tokens_NR = torch.multinomial(drawn_V, 400 * 6, True, generator=generator).view(400, 6)
    logp_V = logits_V.log_softmax(0)
    h_NR = torch.distributions.Categorical(logits=logits_V).entropy().expand(400, 6)
    mask_NR = funcprobe.response_mask(batch)
    return batch, funcprobe.TokenStats(logp_V[tokens_NR] * mask_NR, h_NR * mask_NR)


def test_check_sampled_from_policy() -> None:
    # P(|z| > 4) is 6e-5 a sample where E is the policy's, whatever the prompts.
    for seed in range(20):
        found = sampler_checks.sampled_from_policy(*independent_tokens(1.0, seed))
        assert found.passed, found.saw
    for wrong in ({"temperature": 0.8}, {"temperature": 1.25}, {"temperature": 1.0, "top_k": 10}):
        found = sampler_checks.sampled_from_policy(*independent_tokens(seed=1, **wrong))
        assert not found.passed, found.saw
        assert found.advisory
    batch, stats = independent_tokens(1.0, 1)
    excess_N = (stats.logp_NR + stats.entropy_NR).sum(1)
    z = float(excess_N.mean() / excess_N.std() * 20)
    assert (
        f"z = {z:.2g}" in sampler_checks.sampled_from_policy(batch, stats).saw
    )  # of such entropies, plain
    nan = stats._replace(entropy_NR=stats.entropy_NR * float("nan"))
    assert not sampler_checks.sampled_from_policy(batch, nan).passed


@pytest.mark.parametrize(("rare", "passed"), [(0.0, True), (1e-3, True), (0.05, False)])
def test_a_sample_without_rare_tokens_has_an_error_all_the_same(rare, passed) -> None:
    """1396 likely tokens: no rare one of chance 1e-3 has probability e^-1.4, of 0.05 e^-72."""
    batch = random_batch([(i % 7, 2, 1 + i % 6) for i in range(400)])
    mask_NR = funcprobe.response_mask(batch)
    assert int(mask_NR.sum()) == 1396
    p_V = torch.tensor([1 - rare, rare], dtype=torch.float64)
    h = float(torch.distributions.Categorical(p_V).entropy()) if rare else 0.0
    stats = funcprobe.TokenStats(p_V[0].log() * mask_NR, h * mask_NR)
    assert sampler_checks.sampled_from_policy(batch, stats).passed == passed


def test_check_sampler_near_policy() -> None:
    batch, stats = independent_tokens(1.0, 1)
    mask_NR = funcprobe.response_mask(batch)

    def shifted(few: int) -> Check:
        """The sampler is far less sure of the first `few` responses, which weigh 1000 each."""
        shift_NR = torch.zeros_like(stats.logp_NR)
        shift_NR[:few, 0] = math.log(1000)
        return sampler_checks.sampler_near_policy(batch, stats, stats.logp_NR - shift_NR)

    assert shifted(0).passed
    assert "ESS 400 of 400" in shifted(0).saw
    found = shifted(2)
    expected = (2000 + 398) ** 2 / (2e6 + 398)  # about 2.9
    assert f"ESS {expected:.4g} of 400" in found.saw
    assert not found.passed
    assert found.advisory
    # ESS of k equal large weights is k: half of them pass.
    ratios_NR = torch.where(torch.arange(400)[:, None] < 200, 1e3, -1e3) * mask_NR
    assert sampler_checks.sampler_near_policy(batch, stats, stats.logp_NR - ratios_NR).passed is False
    even_NR = torch.full_like(stats.logp_NR, 600.0)  # whose exponential has no square
    even_NR[:, 1:] = 0
    assert sampler_checks.sampler_near_policy(batch, stats, stats.logp_NR - even_NR).passed


def test_check_sampler_logp_is_its_own() -> None:
    batch, stats = independent_tokens(1.0, 1)
    assert sampler_checks.sampler_logp_is_its_own(batch, stats, stats.logp_NR).passed
    raw_NR = stats.logp_NR / 0.8  # not even normalised: every ratio is at least 1
    assert not sampler_checks.sampler_logp_is_its_own(batch, stats, raw_NR).passed


def test_check_explained_by_temperature() -> None:
    batch, stats = independent_tokens(1.0, 1)
    raw_NR = stats.logp_NR / 0.8
    found = sampler_checks.sampler_logp_is_its_own(batch, stats, raw_NR)
    own = sampler_checks.explained_by_temperature(
        found, batch, stats, stats._replace(logp_NR=raw_NR), raw_NR
    )
    assert "raw_logprobs" in own.failure_means
    assert sampler_checks.explained_by_temperature(found, batch, stats, stats, raw_NR) == found


def test_every_check_is_tested():
    public = {n for n, f in vars(sampler_checks).items() if callable(f)}
    public = {n for n in public if vars(sampler_checks)[n].__module__ == sampler_checks.__name__}
    assert {f"test_check_{n}" for n in public} <= globals().keys()
