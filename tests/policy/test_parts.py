"""A model as backbone and head: what it does to its logits is in the numbers, in closed form or not."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
)

import funcprobe
from funcprobe.policy.precision import arithmetic_of
from support.builders import BATCH, SHAPE, built, with_lora
from support.policies import random_like


def granite(dtype):
    return with_lora(GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)), dtype)


def cohere(dtype):
    return with_lora(CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)), dtype)


def minicpm(dtype):
    """Its hidden state is divided by 4 before the output embedding."""
    mla = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    shape = SHAPE | mla | {"num_key_value_heads": 2}
    config = MiniCPM3Config(**shape, v_head_dim=8, dim_model_base=4)
    return with_lora(MiniCPM3ForCausalLM(config), dtype)


class Scaled(LlamaForCausalLM):
    """Logits 3 tanh(1.3 u), of slope 3.9 and softcap 3."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 3 * torch.tanh(1.3 * out.logits)
        return out


class Shifted(LlamaForCausalLM):
    """Its logits differ from the head's in one entry, by little: no scale, and no softcap."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., 3] += 1e-4
        return out


def scaled(dtype):
    return with_lora(Scaled(LlamaConfig(**SHAPE)), dtype)


def shifted(dtype):
    return with_lora(Shifted(LlamaConfig(**SHAPE)), dtype)


def gemma2(dtype):
    config = Gemma2Config(
        **SHAPE, head_dim=8, final_logit_softcapping=0.8, attn_implementation="eager", sliding_window=4
    )
    return with_lora(Gemma2ForCausalLM(config), dtype)


# (what divides the scores, the cap of the embedding's product) at temperature 0.7
CLOSED = {
    granite: (3.0, None),
    cohere: (1 / 0.25, None),
    minicpm: (4.0, None),
    scaled: (1 / 3.9, 1 / 1.3),
    gemma2: (1.0, 0.8),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", CLOSED)
def test_a_scale_and_a_softcap_are_found(build, dtype):
    model = built(build, dtype)
    readout = funcprobe.bind(model, temperature=0.7).forward.readout
    divided, softcap = CLOSED[build]
    assert readout.temperature == pytest.approx(0.7 * divided, rel=1e-12)
    assert readout.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-12))


@pytest.mark.parametrize("build", [*CLOSED, shifted])
def test_log_probabilities_are_those_of_the_models_own_logits(build):
    model = built(build)
    probe = funcprobe.bind(model, temperature=0.7, max_tokens=64)
    assert (probe.forward.readout is None) is (build is shifted)
    stats = probe.token_stats(probe.params, BATCH)

    def own(params):
        """l of every response token, each sequence alone, by the model that knows nothing of rows."""
        found = torch.zeros_like(stats.logp_NR)
        for i, (x, y) in enumerate(zip(BATCH.prompt_length_N, BATCH.response_length_N, strict=True)):
            ids_L = BATCH.tokens_NL[i, : x + y]
            with arithmetic_of(params):
                logits_LV = torch.func.functional_call(model, params, (ids_L[None],)).logits[0] / 0.7
            logp_RV = logits_LV[x - 1 : -1].log_softmax(-1)
            found[i, :y] = logp_RV.gather(1, ids_L[x:, None])[:, 0]
        return found

    with torch.no_grad():
        torch.testing.assert_close(stats.logp_NR, own(probe.params), rtol=1e-12, atol=1e-12)
        # Forward mode and reverse mode against differences: eta^2 times a third derivative.
        v, eta = random_like(probe.params), 1e-6
        ends = [own(funcprobe.tree.axpy(s * eta, v, probe.params)) for s in (1.0, -1.0)]
    measured = (ends[0] - ends[1]) / (2 * eta)
    _, tangent = probe.tangents(probe.params, BATCH, v)
    torch.testing.assert_close(tangent.logp_NR, measured, rtol=1e-6, atol=1e-6)
    p_NR = random_like({"p": stats.logp_NR})["p"]
    grads = probe.weighted_grad(probe.params, BATCH, p_NR, torch.zeros_like(p_NR))
    expected = float((p_NR * tangent.logp_NR).sum())
    assert funcprobe.tree.dot(grads, v) == pytest.approx(expected, rel=1e-10)
