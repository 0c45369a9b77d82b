"""Dropout masks by seed: plain PyTorch in training mode with the same masks, and their distribution."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import funcprobe
from funcprobe import InputError, UpdateBatch, masked_forwards
from funcprobe.policy import dropout
from funcprobe.policy.dropout import dropouts, listed, unmaskable
from funcprobe.policy.layout import microbatches
from support.builders import GPT2, SHAPE
from support.policies import random_batch, tiny_policy

# A prompt of three responses, so that layouts differ; lengths that make padding.
BATCH = random_batch([(0, 5, 2), (0, 5, 4), (0, 5, 1), (1, 2, 6), (2, 3, 3)])
P = 0.3


def with_lora(base, targets="all-linear", p=P, **lora):
    """In float64, every factor random."""
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=p, target_modules=targets, task_type="CAUSAL_LM", **lora
    )
    model = get_peft_model(base, config)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor, std=0.3)
    return model.double().eval()


def qwen2(p: float = P, **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return with_lora(tiny_policy(**config).unload().float(), p=p)


def gpt2(**drops):
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(**GPT2 | none | drops))
        return with_lora(base, ["c_attn", "c_fc"], fan_in_fan_out=True)


def bound(model) -> tuple[funcprobe.Probe, list[funcprobe.Forward]]:
    probe = funcprobe.bind(model)
    return probe, masked_forwards(model, probe.params, probe.forward, 2, seed=5)


@pytest.mark.parametrize("make", [qwen2, lambda: gpt2(resid_pdrop=0.2, embd_pdrop=0.1)])
def test_gradient_is_pytorchs_in_training_mode_with_the_same_masks(make) -> None:
    model = make()
    probe, (forward, _) = bound(model)
    forward = forward._replace(layout="plain")
    c_NR = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    c_NR *= funcprobe.response_mask(BATCH)
    Y = funcprobe.grad_Y(probe.params, UpdateBatch(BATCH, c_NR), forward, 10**4)

    unmasked = probe.grad_Y(probe.params, UpdateBatch(BATCH, c_NR))

    modules = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    masks: dict[int, torch.Tensor] = {}

    def record(module, given, output):
        # Of hidden states, random floats: none is 0.
        masks[id(module)] = (output / given[0]).detach()

    (rows,) = microbatches(BATCH, 10**4)
    hooks = [module.register_forward_hook(record) for module in modules]
    forward.hidden(probe.params, rows)
    for hook in hooks:
        hook.remove()
    assert len(masks) == len(modules) == len(dropouts(model))
    for module in modules:
        values = masks[id(module)]
        kept = values > 0.5
        assert torch.allclose(values[kept], torch.tensor(1 / (1 - module.p)).double(), rtol=1e-6)
        assert not values[~kept].any()
        module.forward = lambda x, m=module: x * masks[id(m)]
    model.train()
    order = rows.sequence_T.unique_consecutive()
    assert sorted(order.tolist()) == list(range(5))
    logits = model(input_ids=rows.tokens_NL).logits
    logp = functional.log_softmax(logits.double(), -1)[rows.row_T, rows.position_T]
    logp_T = logp.gather(-1, rows.target_T[:, None])[:, 0]
    J = (c_NR[rows.sequence_T, rows.k_T] * logp_T).sum()
    names = list(probe.params)
    named = dict(model.named_parameters())
    expected = torch.autograd.grad(J, [named[n] for n in names])
    for name, grad in zip(names, expected, strict=True):
        # Rotary tables and norms of the plain model are float32 inside: 1e-7, some layers deep.
        torch.testing.assert_close(Y[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    assert funcprobe.tree.norm(funcprobe.tree.axpy(-1.0, Y, unmasked)) > 0.1 * funcprobe.tree.norm(Y)


def test_masks_do_not_depend_on_microbatches_and_layout() -> None:
    probe, masks = bound(qwen2())
    expected = funcprobe.token_stats(probe.params, BATCH, masks[0]._replace(layout="plain"), 10**4)
    for layout in ("plain", "packed"):
        for most in (9, 16, 40):
            forward = masks[0]._replace(layout=layout)
            found = funcprobe.token_stats(probe.params, BATCH, forward, most)
            # Sums in another order: 1e-16, some thousand of them.
            torch.testing.assert_close(found.logp_NR, expected.logp_NR, rtol=1e-12, atol=1e-12)
    assert masks[0].layout == "packed"  # a shared prompt would share its mask
    again = bound(qwen2())[1]
    assert torch.equal(
        funcprobe.token_stats(probe.params, BATCH, again[0]).logp_NR,
        funcprobe.token_stats(probe.params, BATCH, masks[0]).logp_NR,
    )
    with pytest.raises(ValueError, match="a prompt is shared"):
        funcprobe.token_stats(probe.params, BATCH, masks[0]._replace(layout="shared"))


def test_every_forward_seed_and_sequence_has_masks_of_its_own() -> None:
    model = qwen2()
    probe, masks = bound(model)
    others = masked_forwards(model, probe.params, probe.forward, 2, seed=6)
    same = funcprobe.select(BATCH, torch.tensor([1, 1, 1]))  # one response three times
    found = [funcprobe.token_stats(probe.params, same, f).logp_NR for f in (*masks, *others)]
    rows = torch.cat(found)
    assert len({tuple(row.tolist()) for row in rows}) == 12
    assert len({float(row[0]) for row in rows}) == 12  # from the first token on


def test_masks_are_bernoulli_and_independent() -> None:
    """Means and correlations of 40 calls, against their standard errors."""
    (rows,) = microbatches(BATCH, 10**4)
    ones = torch.ones(*rows.tokens_NL.shape, 50)
    with dropout._Masks("0", rows):
        drawn = torch.stack([functional.dropout(ones, P, False) for _ in range(40)])
    real = torch.zeros(rows.tokens_NL.shape, dtype=torch.bool)
    for row, length in enumerate(BATCH.prompt_length_N + BATCH.response_length_N - 1):
        order = (BATCH.prompt_length_N + BATCH.response_length_N).argsort(descending=True, stable=True)
        real[order.argsort()[row], : int(length)] = True
    kept = (drawn * (1 - P))[:, real]  # [call, token, feature]
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    count, sd = kept.numel(), math.sqrt(P * (1 - P))
    assert abs(float(kept.mean()) - (1 - P)) < 4 * sd / math.sqrt(count)
    centred = (kept - (1 - P)) / sd
    for dim in range(3):
        products = (centred * centred.roll(1, dim)).flatten()  # neighbours: calls, tokens, features
        assert abs(float(products.mean())) < 4 / math.sqrt(count)
    # Linear in the mask: the mean over calls is the input.
    x = torch.randn(kept.shape[1:], generator=torch.Generator().manual_seed(2))
    mean = (kept * x / (1 - P)).mean(0)
    z = (mean - x) / (x.abs() * sd / (1 - P) / math.sqrt(40))
    assert float(z.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / z.numel()))


def test_certain_probabilities() -> None:
    (rows,) = microbatches(BATCH, 10**4)
    x = torch.ones(*rows.tokens_NL.shape, 3)
    with dropout._Masks("0", rows) as masks:
        assert functional.dropout(x, 0.0, False) is x
        assert not functional.dropout(x, 1.0, False).any()
        assert masks.calls == 1
        with pytest.raises(InputError, match=r"shape \(3, 3\)"):
            functional.dropout(x[0, :3, :3], 0.5, False)


def test_what_is_random_in_training_is_found() -> None:
    found = listed(dropouts(qwen2(attention_dropout=0.1)))
    assert found == "lora_dropout = 0.3, attention_dropout = 0.1"
    assert "router_jitter_noise = 0.1" in listed(dropouts(mixtral()))
    assert len(dropouts(qwen2())) == 14  # seven linears in each of two layers
    assert dropouts(qwen2(p=0.0)) == []
    assert dropouts(tiny_policy()) == []
    disabled = qwen2()
    for module in disabled.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    assert dropouts(disabled) == []
    two = qwen2()
    two.add_adapter("other", LoraConfig(r=2, lora_dropout=0.7, target_modules=["q_proj"]))
    assert listed(dropouts(two)) == "lora_dropout = 0.3"
    two.set_adapter("other")
    assert listed(dropouts(two)) == "lora_dropout = 0.7"
    assert "summary" not in listed(dropouts(gpt2()))
    found = listed(dropouts(gpt2(resid_pdrop=0.2, attn_pdrop=0.1)))
    assert found == "lora_dropout = 0.3, attn_dropout = 0.1, resid_dropout = 0.2, dropout = 0.2"


def test_lora_of_an_embedding_has_no_dropout() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = with_lora(tiny_policy().unload().float(), ["embed_tokens", "q_proj"])
    assert len(dropouts(model)) == 2
    bound(model)


def mixtral():
    shape = SHAPE | {"num_local_experts": 2, "router_jitter_noise": 0.1}
    return with_lora(MixtralForCausalLM(MixtralConfig(**shape)), ["q_proj"])


def opt():
    config = OPTConfig(
        vocab_size=11,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.2,
    )
    return with_lora(OPTForCausalLM(config), ["q_proj"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: qwen2(attention_dropout=0.1), r"trained with attention_dropout = 0\.1, of which no"),
        (lambda: gpt2(attn_pdrop=0.1), r"does not call .*attn_dropout \(attn_dropout = 0\.1\)"),
        (opt, r"trained with dropout = 0\.2"),
        (
            lambda: with_lora(tiny_policy().unload().float(), ["q_proj", "lm_head"]),
            r"does not call .*lm_head\.lora_dropout",
        ),
    ],
)
def test_dropout_without_masks_is_refused(make, said) -> None:
    model = make()
    params = funcprobe.trainable_params(model)
    forward = funcprobe.frozen_forward(model, params)
    assert unmaskable(model, params, forward)
    with pytest.raises(InputError, match=said) as error:
        masked_forwards(model, params, forward, 2, 0)
    assert "\n" not in str(error.value)
    assert not any(m._forward_hooks for m in model.modules())


def test_too_few_masks_and_no_dropout_are_refused(policy64, probe64) -> None:
    with pytest.raises(InputError, match="the model has no dropout"):
        masked_forwards(policy64, probe64.params, probe64.forward, 2, 0)
    with pytest.raises(InputError, match="1 dropout masks: at least 2"):
        masked_forwards(policy64, probe64.params, probe64.forward, 1, 0)
