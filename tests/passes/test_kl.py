"""KL to the base policy, token by token: a dense oracle with the adapter disabled, and differences."""

import pytest
import torch

import funcprobe
from funcprobe import tree
from funcprobe.passes.kl import kl_along, token_kl
from funcprobe.policy import precision
from funcprobe.policy.forward import with_params
from support.builders import BATCH, BUILDERS, built
from support.policies import random_like, tiny_policy

ETAS = (0.0, 1e-3, -2e-3)


def dense(model, batch, temperature: float, params) -> torch.Tensor:
    """By the model's own logits of one sequence after another; the base by peft's own switch."""
    mask = funcprobe.response_mask(batch)
    kl_NR = torch.zeros(mask.shape, dtype=torch.float64)
    for i in range(len(mask)):
        start, count = int(batch.prompt_length_N[i]), int(batch.response_length_N[i])
        row = batch.tokens_NL[i, : start + count][None]

        def logp(row: torch.Tensor = row) -> torch.Tensor:
            with torch.no_grad(), precision.StayFloat64():
                logits = model(input_ids=row).logits[0]
            return (logits / temperature).double().log_softmax(-1)

        p = with_params(model, params, logp)
        with model.disable_adapter():
            q = logp()
        for k in range(count):
            here, there = p[start + k - 1], q[start + k - 1]
            kl_NR[i, k] = (here.exp() * (here - there)).sum()
    return kl_NR


@pytest.mark.parametrize("build", BUILDERS, ids=lambda b: b.__name__)
def test_by_a_dense_forward_and_by_differences(build):
    """Of every head: tied, with a cap, with LoRA, trained. Central differences at 1e-6 in float64 are
    off by 1e-12 times a third derivative, up to 1e7 with a trained embedding, and by 1e-15 / 1e-6."""
    model = built(build)
    params = funcprobe.trainable_params(model)
    forward = funcprobe.frozen_forward(model, params, 0.7)
    base = funcprobe.base_params(model, params)
    v = tree.scale(0.05, random_like(params))
    found = kl_along(params, base, BATCH, v, forward, ETAS)
    expected = dense(model, BATCH, 0.7, params)
    assert float(expected.max()) > 1e-2
    torch.testing.assert_close(found.kl_NR, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.moved[0], found.kl_NR)  # bit for bit at eta = 0
    for eta, moved_NR in zip(ETAS, found.moved, strict=True):
        there = dense(model, BATCH, 0.7, tree.axpy(eta, v, params))
        torch.testing.assert_close(moved_NR, there, rtol=1e-9, atol=1e-12)
    up, down = (token_kl(tree.axpy(e, v, params), base, BATCH, forward) for e in (1e-6, -1e-6))
    slope = (up - down) / 2e-6
    torch.testing.assert_close(found.tangent_NR, slope, rtol=1e-6, atol=1e-8)
    assert float(found.tangent_NR.abs().max()) > 1e-3
    mask = funcprobe.response_mask(BATCH)
    assert not found.kl_NR[~mask].any()
    assert not found.tangent_NR[~mask].any()


def test_any_size_of_microbatch_and_chunk(policy64, probe64, monkeypatch):
    base = funcprobe.base_params(policy64, probe64.params)
    v = random_like(probe64.params)
    whole = kl_along(probe64.params, base, BATCH, v, probe64.forward, (1e-3,))
    monkeypatch.setattr("funcprobe.policy.readout.MOST", 2)
    parts = kl_along(probe64.params, base, BATCH, v, probe64.forward, (1e-3,), 12)
    for a, b in zip((*whole[:2], *whole.moved), (*parts[:2], *parts.moved), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_a_policy_has_no_divergence_from_itself(probe64):
    v = random_like(probe64.params)
    found = kl_along(probe64.params, probe64.params, BATCH, v, probe64.forward)
    assert not found.kl_NR.any()
    assert not found.tangent_NR.any()  # a minimum
    assert found.moved == ()


def test_half_precision_is_summed_in_float32():
    """Against the same weights in float64: logits in bfloat16 carry 3 digits, sums of them more."""
    model = tiny_policy(dtype=torch.bfloat16)
    params = funcprobe.trainable_params(model)
    forward = funcprobe.frozen_forward(model, params)
    base = funcprobe.base_params(model, params)
    found = token_kl(params, base, BATCH, forward)
    exact = tiny_policy(dtype=torch.bfloat16).to(torch.float64)
    wide = {n: t.double() for n, t in params.items()}
    of64 = funcprobe.frozen_forward(exact, funcprobe.trainable_params(exact))
    expected = token_kl(wide, {n: t.double() for n, t in base.items()}, BATCH, of64)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)


def test_another_registry_is_refused(probe64):
    some = dict(list(probe64.params.items())[1:])
    with pytest.raises(ValueError, match="reference"):
        token_kl(probe64.params, some, BATCH, probe64.forward)
