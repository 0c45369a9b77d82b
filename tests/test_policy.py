"""The bound forward: the peft model's own logits, a refusal where it would lie, and no trace left."""

import math

import pytest
import torch
from conftest import random_batch, random_like, tiny_policy
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import funcprobe
from funcprobe import AdamGroup, InputError, UpdateBatch
from funcprobe.passes import head
from funcprobe.policy.forward import frozen_forward, trainable_params
from funcprobe.policy.layout import microbatches
from funcprobe.policy.precision import arithmetic_of

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GPT2 = {
    "vocab_size": 11,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.3,
}


def with_lora(base, dtype, targets="all-linear", **lora):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", **lora)
    model = get_peft_model(base, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def llama(dtype):
    return with_lora(LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)), dtype)


def gemma2(dtype):
    # A cap of 0.8 bends logits of this size visibly; the true 30 would hardly.
    config = Gemma2Config(
        **SHAPE, head_dim=8, final_logit_softcapping=0.8, attn_implementation="eager", sliding_window=4
    )
    return with_lora(Gemma2ForCausalLM(config), dtype)


def gpt2(dtype):
    return with_lora(
        GPT2LMHeadModel(GPT2Config(**GPT2)), dtype, ["c_attn", "c_fc"], fan_in_fan_out=True
    )


def llama_with_lora_on_the_head(dtype):
    return with_lora(LlamaForCausalLM(LlamaConfig(**SHAPE)), dtype, ["q_proj", "lm_head"])


def llama_with_a_trainable_head(dtype):
    return with_lora(
        LlamaForCausalLM(LlamaConfig(**SHAPE)), dtype, ["v_proj"], modules_to_save=["lm_head"]
    )


def qwen2(dtype):
    return tiny_policy(dtype=dtype)


def llama_with_tied_tokens(dtype):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    return with_lora(base, dtype, ["v_proj"], trainable_token_indices=[3, 7])


def llama_with_a_tied_trainable_head(dtype):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    saved = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    return with_lora(base, dtype, ["v_proj"], **saved)


BUILDERS = [
    qwen2,
    llama,
    gemma2,
    gpt2,
    llama_with_lora_on_the_head,
    llama_with_a_trainable_head,
    llama_with_tied_tokens,
    llama_with_a_tied_trainable_head,
]


def built(build, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return build(dtype)


BATCH = random_batch([(0, 3, 4), (1, 5, 1), (2, 1, 6), (0, 3, 2)])


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


def granite(dtype):
    return with_lora(GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)), dtype)


def cohere(dtype):
    return with_lora(CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)), dtype)


class ShiftedLlama(LlamaForCausalLM):
    """Its logits differ from the head's in one entry, by little."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., 3] += 1e-4
        return out


def shifted(dtype):
    return with_lora(ShiftedLlama(LlamaConfig(**SHAPE)), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("build", "name"), [(granite, "GraniteFor"), (cohere, "CohereFor"), (shifted, "ShiftedLlama")]
)
def test_logits_that_are_not_the_heads_are_refused(build, name, dtype):
    with pytest.raises(InputError, match=f"{name}.*logits are not the output embedding"):
        funcprobe.bind(built(build, dtype))


class ScaledLlama(LlamaForCausalLM):
    """Its logits are a tenth larger than the head's: several units of bfloat16's last place."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits *= 1.1
        return out


def test_bfloat16_hides_no_factor_on_the_logits():
    funcprobe.bind(built(llama, torch.bfloat16))
    scaled = with_lora(ScaledLlama(LlamaConfig(**SHAPE)), torch.bfloat16)
    with pytest.raises(InputError, match="ScaledLlama: logits are not the output embedding"):
        funcprobe.bind(scaled)


def t5():
    shape = {"vocab_size": 11, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("base", "targets", "kind", "says"),
    [
        (
            lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE)),
            ["q_proj"],
            "SEQ_CLS",
            "LlamaForSequenceClassification, without an output embedding",
        ),
        (
            lambda: LlamaModel(LlamaConfig(**SHAPE)),
            ["q_proj"],
            None,
            "LlamaModel, without an output embedding",
        ),
        (t5, ["q"], "SEQ_2_SEQ_LM", "T5ForConditionalGeneration, an encoder-decoder"),
        (lambda: torch.nn.Linear(2, 2), None, None, "Linear, without an output embedding"),
    ],
)
def test_a_model_that_is_no_causal_one_is_refused(base, targets, kind, says):
    model = base()
    if targets:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type=kind))
    with pytest.raises(InputError, match=f"the model is {says}: a causal language model is expected"):
        funcprobe.bind(model.eval())


def in_training(model):
    model.train()


def an_adapter_added_later(model):
    # its new modules, dropout among them, are born in training mode
    model.add_adapter("other", model.peft_config["default"])


def checkpointing(model):
    model.gradient_checkpointing_enable()


def inputs_require_grads(model):
    model.enable_input_require_grads()


def other_adapter(model):
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.eval()


def merged(model):
    model.merge_adapter()


def a_compiled_layer(model):
    model.get_base_model().model.layers[1].compile(backend="eager")


def a_layer_replaced_by_its_compilation(model):
    layers = model.get_base_model().model.layers
    layers[1].mlp.act_fn = torch.compile(layers[1].mlp.act_fn, backend="eager")


SPOILED = [
    (in_training, r"training mode.*model\.eval\(\)"),
    (an_adapter_added_later, r"training mode.*model\.eval\(\)"),
    (checkpointing, r"gradient checkpointing is on"),
    (inputs_require_grads, r"disable_input_require_grads\(\)"),
    (other_adapter, r"adapter default not active"),
    (merged, r"merged into the base"),
    (a_compiled_layer, r"model\.layers\.1 is compiled.*bind the model before compile\(\)"),
    (a_layer_replaced_by_its_compilation, r"layers\.1\.mlp\.act_fn is compiled"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILED)
def test_a_model_whose_forward_would_be_another_is_refused(spoil, says):
    model = built(qwen2)
    params = trainable_params(model)
    spoil(model)
    with pytest.raises(InputError, match=says):
        frozen_forward(model, params)


@pytest.mark.parametrize(("spoil", "says"), SPOILED)
def test_a_model_that_changes_after_binding_is_refused(spoil, says):
    model = built(qwen2)
    probe = funcprobe.bind(model)
    probe.token_stats(probe.params, BATCH)
    spoil(model)
    with pytest.raises(InputError, match=says):
        probe.token_stats(probe.params, BATCH)


def test_dora_is_refused():
    """peft detaches its weight norm: both routes would agree on a derivative that is not one."""
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).eval()
    with pytest.raises(InputError, match="DoRA is not supported"):
        funcprobe.bind(model)


def test_dora_that_is_not_active_is_no_part_of_the_policy():
    model = built(llama_with_a_trainable_head)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], use_dora=True))
    model.set_adapter("default")
    model.double().eval()
    bound = funcprobe.bind(model)
    alone = funcprobe.bind(built(llama_with_a_trainable_head))
    assert bound.params.keys() == alone.params.keys()
    assert torch.equal(bound.seq_logprobs(bound.params, BATCH), alone.seq_logprobs(alone.params, BATCH))
    model.set_adapter("other")
    with pytest.raises(InputError, match="DoRA is not supported"):
        funcprobe.bind(model)


def test_another_variant_of_lora_is_refused_by_name():
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    config = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3])
    model = get_peft_model(base, config).eval()
    with pytest.raises(InputError, match=r"q_proj: peft's ALoraLinearVariant is not supported"):
        funcprobe.bind(model)


def test_two_parameters_of_one_memory_are_refused():
    model = built(qwen2)
    params = dict(model.named_parameters())
    one, two = (f"base_model.model.model.layers.{i}.mlp.up_proj.lora_A.default.weight" for i in (0, 1))
    params[two].data = params[one].data
    with pytest.raises(InputError, match=f"{one} and {two} share memory"):
        funcprobe.bind(model)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_a_parameter_that_is_no_plain_tensor_is_refused(dtype):
    """As packed weights are: integers, or a subclass that knows its scales."""

    class Packed(torch.nn.Parameter):
        pass

    model = built(qwen2)
    kind = Packed if dtype.is_floating_point else torch.nn.Parameter
    model.get_base_model().model.norm.extra = kind(torch.zeros(2, dtype=dtype), requires_grad=False)
    with pytest.raises(InputError, match=rf"norm.extra is a {kind.__name__} of {dtype}, a plain"):
        funcprobe.bind(model)


def test_an_architecture_without_forward_mode_is_refused_at_once():
    class NoForwardMode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    model = built(qwen2)
    norm = model.get_base_model().model.norm
    inner = norm.forward
    norm.forward = lambda x: NoForwardMode.apply(inner(x))
    with pytest.raises(InputError, match=r"torch\.func cannot differentiate"):
        funcprobe.bind(model)


def test_a_disabled_adapter_is_refused():
    model = built(qwen2)
    params = trainable_params(model)
    bound = funcprobe.bind(model)
    with model.disable_adapter():
        with pytest.raises(InputError, match=r"not active.*leave disable_adapter\(\)"):
            frozen_forward(model, params)
        # functional_call would give the base model, and zero gradients
        with pytest.raises(InputError, match="not active"):
            bound.token_stats(params, BATCH)
    frozen_forward(model, params)
    bound.token_stats(params, BATCH)


def test_a_second_adapter_is_the_registry_when_it_is_active():
    model = built(qwen2)
    other_adapter(model)
    params = trainable_params(model)
    assert params
    assert all(".other." in n for n in params)
    frozen_forward(model, params)
    model.set_adapter("default")
    with pytest.raises(InputError, match="adapter other not active"):
        frozen_forward(model, params)


@pytest.mark.parametrize("kind", ["lora_embedding_A", "lora_B", "modules_to_save"])
def test_parameters_of_every_kind_must_be_of_an_active_adapter(kind):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = with_lora(base, torch.float64, ["embed_tokens", "v_proj"], modules_to_save=["lm_head"])
    params = {n: t for n, t in trainable_params(model).items() if kind in n}
    assert params
    frozen_forward(model, params)
    other_adapter(model)
    with pytest.raises(InputError, match="adapter default not active"):
        frozen_forward(model, params)


def test_no_trainable_parameters_are_refused():
    with pytest.raises(InputError, match="no trainable parameters"):
        funcprobe.bind(built(qwen2).requires_grad_(False))


def test_parameters_of_other_names_or_shapes_are_refused():
    model = built(qwen2)
    probe = funcprobe.bind(model)
    params = probe.params
    name = next(iter(params))
    wrong = {
        "unknown": (params | {"lm_head.other": params[name]}, "unexpected lm_head.other"),
        "frozen": (
            params | {"base_model.model.lm_head.weight": torch.zeros(11, 16)},
            "unexpected base_model",
        ),
        "missing": ({n: t for n, t in params.items() if n != name}, f"missing {name}"),
        "without the adapter's name": (
            {n.replace(".default", ""): t for n, t in params.items()},
            "names do not match",
        ),
        "transposed": (params | {name: params[name].T}, f"{name} has shape"),
    }
    for given, says in wrong.values():
        for call in (probe.token_stats, probe.seq_logprobs):
            with pytest.raises(ValueError, match=says):
                call(given, BATCH)
        with pytest.raises(ValueError, match=says):
            probe.tangents(params, BATCH, given)
        with pytest.raises(ValueError, match=says):
            probe.alpha_vjp(params, BATCH, given)
    with pytest.raises(InputError, match=r"nowhere\.weight is not a parameter"):
        frozen_forward(model, {"nowhere.weight": torch.zeros(2)})


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
    update = UpdateBatch(BATCH, random_like({"c": p_NR})["c"] * p_NR)
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


def with_rope(**parameters):
    torch.manual_seed(0)
    rope = {"rope_parameters": {"rope_theta": 1e4, **parameters}}
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"max_position_embeddings": 12} | rope))


def test_rotary_embeddings_that_depend_on_the_microbatch_are_refused():
    model = with_lora(with_rope(rope_type="dynamic", factor=2.0), torch.float64)
    probe = funcprobe.bind(model, max_tokens=64)
    assert probe.forward.layout == "shared"
    # The last token of a sequence is predicted, not read.
    probe.token_stats(probe.params, random_batch([(0, 3, 9), (1, 5, 8)]))
    packed = funcprobe.collate([[1, 2, 3]] * 2, [[4, 5], list(range(11))], [0, 0])
    for long in (random_batch([(0, 3, 9), (1, 5, 9)]), packed):
        with pytest.raises(InputError, match="13 input tokens: above 12 this model's"):
            probe.token_stats(probe.params, long)
    plain = funcprobe.bind(with_lora(with_rope(rope_type="default"), torch.float64), max_tokens=64)
    plain.token_stats(plain.params, packed)


def test_longrope_is_refused():
    """It writes into its frequencies at every call; without derivatives, from its length on."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    base = with_rope(rope_type="longrope", factor=2.0, original_max_position_embeddings=12, **factors)
    model = with_lora(base, torch.float64)
    with pytest.raises(InputError, match="cannot differentiate"):
        funcprobe.bind(model, max_tokens=64)
    params = trainable_params(model)
    forward = frozen_forward(model, params)
    funcprobe.token_stats(params, random_batch([(1, 5, 8)]), forward, 64)
    with pytest.raises(InputError, match="13 input tokens: above 12"):
        funcprobe.token_stats(params, random_batch([(1, 5, 9)]), forward, 64)


def test_a_long_sequence_does_change_a_short_one_there():
    model = with_rope(rope_type="dynamic", factor=2.0).double().eval()
    tokens_NL = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = model(input_ids=tokens_NL[:, :12]).logits
        beside = model(input_ids=tokens_NL).logits[:, :12]
    assert float((alone - beside).abs().max()) > 1e-3
