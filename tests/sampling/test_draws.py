"""Draws: exactly the inverse of the cumulative distribution, and independent of batches and order."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from funcprobe.adapters.config.schema import SamplingConfig
from funcprobe.adapters.sampling import draws
from funcprobe.adapters.sampling.draws import Draws, chosen, uniforms, warpers


def inverse(logits: list[float], u: float) -> int:
    """In float64, a token after the other."""
    weights = [math.exp(x - max(logits)) for x in logits]
    total, so_far = math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        so_far += weight
        if so_far > u * total:
            return token
    return max(i for i, w in enumerate(weights) if w > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_token_is_the_one_whose_interval_holds_the_number(dtype):
    generator = torch.Generator().manual_seed(0)
    logits_NV = (3 * torch.randn(400, 37, generator=generator, dtype=torch.float64)).to(dtype)
    u_N = torch.rand(400, generator=generator, dtype=torch.float64)
    token_N, finite_N = chosen(logits_NV, u_N)
    expected = [inverse(row, u) for row, u in zip(logits_NV.tolist(), u_N.tolist(), strict=True)]
    assert token_N.tolist() == expected
    assert bool(finite_N.all())
    assert len(set(expected)) > 20


def test_ends_of_the_unit_interval_and_tokens_of_weight_zero():
    inf = torch.inf
    logits_NV = torch.tensor([[-inf, 0.0, -inf, 0.0, -inf], [0.0, -inf, -inf, -inf, -inf]])
    last = torch.tensor([1 - 2.0**-53] * 2, dtype=torch.float64)
    assert chosen(logits_NV, last)[0].tolist() == [3, 0]
    assert chosen(logits_NV, torch.zeros(2, dtype=torch.float64))[0].tolist() == [1, 0]
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)  # where the first of two intervals ends
    assert chosen(logits_NV, half)[0].tolist() == [3, 0]
    # Sums of any size: u * total never rounds to a token past the last of weight.
    generator = torch.Generator().manual_seed(1)
    many_NV = torch.randn(2000, 5, generator=generator)
    many_NV[:, 3:] = -inf
    assert int(chosen(many_NV, last[:1].expand(2000))[0].max()) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_reported(bad):
    logits_NV = torch.zeros(3, 4)
    logits_NV[1, 2] = bad
    logits_NV[2] = -math.inf
    token_N, finite_N = chosen(logits_NV, torch.full((3,), 0.9, dtype=torch.float64))
    assert finite_N.tolist() == [True, False, False]
    assert int(token_N.max()) < 4
    one = Draws(SamplingConfig(), torch.full((3, 1), 0.5, dtype=torch.float64), 2)
    one(torch.zeros(3, 2, dtype=torch.long), logits_NV)
    assert not bool(one.finite)


def test_a_large_vocabulary_in_float32_is_not_biased():
    """1e5 draws from 150,000 tokens in 20 cells; float32 sums of that many would lose whole tokens."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(150_000, generator=generator)
    p_V = logits_V.double().softmax(0)
    u_N = torch.from_numpy(np.random.default_rng(1).random(100_000))
    cumulative_V = (logits_V - logits_V.max()).exp().cumsum(0, dtype=torch.float64)
    direct_N = torch.searchsorted(cumulative_V, u_N * cumulative_V[-1], right=True)
    token_N, _ = chosen(logits_V.expand(200, -1), u_N[:200])
    assert torch.equal(token_N, direct_N[:200])
    exact_N = torch.searchsorted(p_V.cumsum(0), u_N, right=True)
    assert float((direct_N != exact_N).double().mean()) < 1e-3  # neighbours, where an interval ends
    seen = torch.bincount(direct_N // 7500, minlength=20)
    share = p_V.view(20, -1).sum(1)
    assert stats.chisquare(seen, share / share.sum() * 100_000).pvalue > 1e-3


def test_numbers_are_uniform_and_of_the_index_alone():
    u_NR = uniforms(3, range(300), 40)
    assert u_NR.dtype == torch.float64
    assert float(u_NR.min()) >= 0
    assert float(u_NR.max()) < 1
    assert torch.equal(uniforms(3, [7, 2], 40), u_NR[[7, 2]])
    assert torch.equal(uniforms(3, [7], 5), u_NR[7:8, :5])  # a longer response begins like it
    assert not torch.equal(uniforms(4, [7], 5), u_NR[7:8, :5])
    # Seeds are fixed: these pass always or never.
    assert stats.kstest(u_NR.flatten(), "uniform").pvalue > 1e-3
    for a, b in pairwise(u_NR[:20]):
        assert abs(float(np.corrcoef(a, b)[0, 1])) < 0.6  # of 40 numbers: 3.9 standard errors
    # 4 words to a block of Philox; the first ones that numpy's documented stream has for this key.
    raw = np.random.Philox(key=[3, 0]).random_raw(2)
    assert u_NR[0, :2].tolist() == [(int(x) >> 11) / 2**53 for x in raw]


def test_temperature_then_top_k_then_top_p():
    logits_NV = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    config = SamplingConfig(temperature=0.5, top_k=3, top_p=0.8)
    found_NV = warpers(config)(torch.zeros(1, 1, dtype=torch.long), logits_NV)
    p_V = (logits_NV[0] / 0.5).softmax(0)[:3]
    p_V /= p_V.sum()
    assert float(p_V[0]) > 0.8  # so that one token is left
    assert found_NV[0, 0] == 4.0
    assert bool((found_NV[0, 1:] == -torch.inf).all())
    assert not warpers(SamplingConfig())


def test_every_function_is_tested():
    public = {n for n, x in vars(draws).items() if getattr(x, "__module__", "") == draws.__name__}
    assert public == {"uniforms", "chosen", "warpers", "Draws"}
