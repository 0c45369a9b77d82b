"""The bound forward: the peft model's own logits, its own parameters, and no trace left."""

import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import funcprobe
from funcprobe import AdamGroup, InputError, UpdateBatch
from funcprobe.passes import head
from funcprobe.policy.forward import frozen_forward, trainable_params
from funcprobe.policy.layout import microbatches
from funcprobe.policy.precision import arithmetic_of
from support.builders import (
    BATCH,
    BUILDERS,
    SHAPE,
    built,
    gemma2,
    llama_with_a_tied_trainable_head,
    llama_with_a_trainable_head,
    llama_with_lora_on_the_head,
    llama_with_tied_tokens,
    qwen2,
    with_lora,
)
from support.policies import random_like


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("build", BUILDERS)
def test_logits_are_the_models_own(build, dtype, temperature):
    model = built(build, dtype)
    params = trainable_params(model)
    forward = frozen_forward(model, params, temperature)
    # Other parameters than the model's: handed over, and written into a second model.
    moved = {n: t + 0.2 * random_like(params)[n] for n, t in params.items()}
    reference = built(build, dtype)
    for n, p in reference.named_parameters():
        if n in moved:
            p.data.copy_(moved[n])
    (rows,) = microbatches(BATCH, 64)
    with torch.no_grad():
        ours_TV = forward.logits(moved, forward.hidden(moved, rows))
        before_TV = forward.logits(params, forward.hidden(params, rows))
        with arithmetic_of(moved):
            theirs_NLV = reference(input_ids=rows.tokens_NL).logits / temperature
            # Alone and unpadded, the second sequence must not see its neighbours.
            alone_NLV = reference(input_ids=BATCH.tokens_NL[1:2, :6]).logits / temperature
    theirs_TV = theirs_NLV[rows.row_T, rows.position_T]
    assert ours_TV.dtype == dtype
    # The same operations on the same rows; a matrix product over packed rows may sum in another
    # order, 16 to 24 terms of size 1.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours_TV, theirs_TV, rtol=50 * eps, atol=50 * eps)
    (token,) = (rows.sequence_T == 1).nonzero().flatten().tolist()
    torch.testing.assert_close(ours_TV[token], alone_NLV[0, 4], rtol=500 * eps, atol=500 * eps)
    assert float((ours_TV - before_TV).abs().max()) > 1e-2  # the parameters do something


@pytest.mark.parametrize("build", BUILDERS)
def test_every_trainable_parameter_is_used(build):
    model = built(build)
    probe = funcprobe.bind(model, max_tokens=64)
    p_NR = random_like({"p": funcprobe.response_mask(BATCH).double()})["p"]
    grads = probe.weighted_grad(probe.params, BATCH, p_NR, torch.zeros_like(p_NR))
    assert list(grads) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert all(bool(g.any()) for g in grads.values())


def test_temperature_divides_the_logits():
    model = built(qwen2)
    params = trainable_params(model)
    (rows,) = microbatches(BATCH, 64)
    plain, hot = (frozen_forward(model, params, t) for t in (1.0, 4.0))
    with torch.no_grad():
        hidden_TD = plain.hidden(params, rows)
        # a division by a power of two is exact
        assert torch.equal(plain.logits(params, hidden_TD), 4 * hot.logits(params, hidden_TD))
        assert torch.equal(hidden_TD, hot.hidden(params, rows))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(InputError, match="temperature"):
        funcprobe.bind(built(qwen2), temperature=temperature)


def test_the_registry_is_sorted_and_shares_storage():
    model = built(qwen2)
    params = trainable_params(model)
    named = dict(model.named_parameters())
    assert list(params) == sorted(n for n, p in named.items() if p.requires_grad)
    for n, t in params.items():
        assert t.data_ptr() == named[n].data_ptr()
        assert not t.requires_grad


def snapshot(model):
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {n: (t, t.detach().clone(), t._version, t.requires_grad, t.grad) for n, t in named.items()}


def require_untouched(model, before):
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == before.keys()
    for n, (tensor, copy, version, requires_grad, grad) in before.items():
        assert after[n] is tensor, n
        assert torch.equal(tensor, copy), n
        assert tensor._version == version, n
        assert tensor.requires_grad == requires_grad, n
        assert tensor.grad is grad is None, n
    assert not any(module.training for module in model.modules())


def everything(probe):
    params = probe.params
    v = random_like(params)
    p_NR = funcprobe.response_mask(BATCH).double()
    update = UpdateBatch(BATCH, random_like({"c": p_NR})["c"] * p_NR, p_NR.sum(1))
    state = funcprobe.fresh_adam_state(params, (AdamGroup(tuple(params), 1e-3, 0.9, 0.99, 1e-8, 0.1),))
    stats = probe.token_stats(params, BATCH)
    return {
        "token_stats": lambda: probe.token_stats(params, BATCH),
        "weighted_grad": lambda: probe.weighted_grad(params, BATCH, p_NR, 2 * p_NR),
        "grad_X": lambda: probe.grad_X(params, BATCH),
        "grad_Y": lambda: probe.grad_Y(params, update),
        "tangents": lambda: probe.tangents(params, BATCH, v),
        "alpha_vjp": lambda: probe.alpha_vjp(params, BATCH, v),
        "predict": lambda: probe.predict(params, BATCH, update, state),
        "measure": lambda: probe.measure(params, BATCH, v, 0.3, stats),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("build", [qwen2, llama_with_tied_tokens, llama_with_a_tied_trainable_head])
def test_the_model_is_untouched(build, dtype):
    model = built(build, dtype)
    before = snapshot(model)
    calls = everything(funcprobe.bind(model, max_tokens=16))
    require_untouched(model, before)
    for call in calls.values():
        call()
        require_untouched(model, before)


def test_the_model_is_untouched_by_a_call_that_fails():
    model = built(qwen2)
    calls = everything(funcprobe.bind(model, max_tokens=16))
    before = snapshot(model)

    def fail(*_):
        raise ZeroDivisionError

    # In the middle of the second layer, with the parameters swapped in; in the head; nowhere.
    modules = dict(model.named_modules())
    places = [n for n in modules if n.endswith(("layers.1.mlp", "lm_head"))]
    assert len(places) == 2
    for place in places:
        handle = modules[place].register_forward_hook(fail)
        for call in calls.values():
            # The output embedding's own forward is passed over, so a hook on it is refused.
            with pytest.raises(InputError if place.endswith("lm_head") else ZeroDivisionError):
                call()
            require_untouched(model, before)
        handle.remove()
    for call in calls.values():
        call()


TRAINED_HEADS = {
    llama_with_lora_on_the_head,
    llama_with_a_trainable_head,
    llama_with_tied_tokens,
    llama_with_a_tied_trainable_head,
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("build", BUILDERS)
def test_the_frozen_output_embedding_gives_the_models_logits(build, temperature):
    """Where closed forms take the place of the model's own head, and a note where they do not."""
    model = built(build)
    params = trainable_params(model)
    forward = frozen_forward(model, params, temperature)
    says = "output embedding trained, or not a plain matrix: derivatives not in closed form"
    assert (forward.readout is None) is (build in TRAINED_HEADS)
    assert (says in forward.notes) is (build in TRAINED_HEADS)
    (rows,) = microbatches(BATCH, 64)
    with torch.no_grad():
        hidden_TD = forward.hidden(params, rows)
        logits_TV = forward.logits(params, hidden_TD)
        found = head.token_head(params, hidden_TD, rows.target_T, forward)
    logp_TV = logits_TV.log_softmax(-1)
    expected_T = logp_TV.gather(1, rows.target_T[:, None])[:, 0]
    torch.testing.assert_close(found[0], expected_T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], -(logp_TV.exp() * logp_TV).sum(1), rtol=1e-12, atol=1e-12)


def with_a_biased_head(dtype):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    base.lm_head = torch.nn.Linear(SHAPE["hidden_size"], SHAPE["vocab_size"], bias=True)
    torch.nn.init.normal_(base.lm_head.bias)
    return with_lora(base, dtype, ["v_proj"])


def test_a_bias_of_the_output_embedding_is_in_the_logits():
    model = built(with_a_biased_head)
    params = trainable_params(model)
    forward = frozen_forward(model, params)
    assert forward.readout.bias_V is not None
    stats = funcprobe.token_stats(params, BATCH, forward, 64)
    with torch.no_grad(), arithmetic_of(params):
        logits_LV = model(input_ids=BATCH.tokens_NL[2:3, :7]).logits[0]
    expected = logits_LV.log_softmax(-1)[torch.arange(6), BATCH.tokens_NL[2, 1:7]]
    torch.testing.assert_close(stats.logp_NR[2], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_on_the_output_embedding_is_run(before):
    """One that is there when the model is bound belongs to the policy, in values and derivatives."""
    model = built(qwen2)
    embedding = model.get_output_embeddings()
    if before:
        embedding.register_forward_pre_hook(lambda _, args: (1.5 * args[0],))
    else:
        embedding.register_forward_hook(lambda _, __, out: 1.5 * out)
    probe = funcprobe.bind(model, max_tokens=64)
    assert probe.forward.readout is None
    assert any("not a plain matrix" in note for note in probe.forward.notes)
    stats = probe.token_stats(probe.params, BATCH)
    unhooked = built(qwen2)
    other = funcprobe.bind(unhooked, temperature=1 / 1.5, max_tokens=64)  # the same scores
    assert other.forward.readout is not None
    expected = other.token_stats(other.params, BATCH)
    torch.testing.assert_close(stats.logp_NR, expected.logp_NR, rtol=1e-12, atol=1e-12)
    p_NR = funcprobe.response_mask(BATCH).double()
    ours, theirs = (p.weighted_grad(p.params, BATCH, p_NR, 0.3 * p_NR) for p in (probe, other))
    assert all(torch.allclose(ours[n], theirs[n], rtol=1e-9, atol=1e-12) for n in ours)


def test_an_output_embedding_of_another_class_keeps_its_own_forward():
    class Squared(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    base.lm_head = Squared(SHAPE["hidden_size"], SHAPE["vocab_size"], bias=False)
    model = with_lora(base, torch.float64, ["v_proj"])
    params = trainable_params(model)
    forward = frozen_forward(model, params)
    assert forward.readout is None
    (rows,) = microbatches(BATCH, 64)
    with torch.no_grad():
        assert bool((forward.logits(params, forward.hidden(params, rows)) >= 0).all())


def test_layouts_that_may_be_used():
    """What is asked for is the most that is used; what a model cannot, it says."""
    model = built(qwen2)
    params = trainable_params(model)
    for layout in ("plain", "packed", "shared"):
        forward = frozen_forward(model, params, layout=layout)
        assert (forward.layout, forward.notes) == (layout, ())
    for share, layout in ((True, "shared"), (False, "packed")):
        assert funcprobe.bind(model, share_prompts=share).forward.layout == layout
    window = built(gemma2)
    forward = frozen_forward(window, trainable_params(window))
    assert forward.layout == "plain"
    assert "packing needs sdpa attention, the model has eager" in forward.notes[0]
