"""Models whose derivatives would lie are refused, when they are bound and whenever they are called."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import funcprobe
from funcprobe import InputError
from funcprobe.policy.forward import frozen_forward, trainable_params
from support.architectures import make_policy
from support.builders import BATCH, SHAPE, built, llama, llama_with_a_trainable_head, qwen2, with_lora
from support.policies import random_batch

BERT = {k: v for k, v in SHAPE.items() if k not in {"num_key_value_heads", "initializer_range"}}


class TokenLlama(LlamaForCausalLM):
    """Its logits are a tenth larger after every token but 0: no function of the hidden state alone."""

    def forward(self, input_ids, *args, **kwargs):
        out = super().forward(input_ids, *args, **kwargs)
        out.logits *= 1 + 0.1 * (input_ids != 0)[..., None]
        return out


# A tenth is several units of bfloat16's last place.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_that_are_not_the_heads_are_refused(dtype):
    funcprobe.bind(built(llama, dtype))
    model = with_lora(TokenLlama(LlamaConfig(**SHAPE)), dtype)
    with pytest.raises(InputError, match="TokenLlama: its logits are not those of its head"):
        funcprobe.bind(model)


def test_a_model_whose_tokens_see_later_ones_is_refused():
    """No row of one length shows it: the logits of an encoder are those of its head, too."""
    base = BertLMHeadModel(BertConfig(**BERT))
    model = with_lora(base, torch.float64)
    with pytest.raises(
        InputError, match=r"BertLMHeadModel: its logits depend on later tokens.*is_decoder"
    ):
        funcprobe.bind(model)
    funcprobe.bind(with_lora(BertLMHeadModel(BertConfig(**BERT, is_decoder=True)), torch.float64))


class FailingLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        raise KeyError("rope")


class UnsplitLlama(LlamaForCausalLM):
    """Reads more of its backbone than hidden states."""

    def forward(self, input_ids, **kwargs):
        out = self.model(input_ids, output_hidden_states=True, use_cache=False)
        logits = self.lm_head(out.last_hidden_state + out.hidden_states[0])
        return CausalLMOutputWithPast(logits=logits)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (FailingLlama, "FailingLlama: its own forward fails: KeyError: 'rope'"),
        (UnsplitLlama, "UnsplitLlama: its logits are not those of its head.*TypeError"),
    ],
)
def test_whatever_a_models_own_code_raises_is_a_line(kind, says):
    with pytest.raises(InputError, match=says) as refused:
        funcprobe.bind(with_lora(kind(LlamaConfig(**SHAPE)), torch.float64))
    assert "\n" not in str(refused.value)


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
    base.get_input_embeddings().padding_idx = None  # rejected where the table is trained
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


@pytest.mark.parametrize("adapter", ["lora-embedding", "trained-embedding", "trained-tokens"])
def test_a_trained_embedding_with_a_padding_row_is_refused(adapter) -> None:
    """Whose gradient in reverse mode lacks a row that forward mode has."""
    model = make_policy("qwen2", adapter)
    funcprobe.bind(model)
    table = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
    table.padding_idx = 3
    with pytest.raises(InputError, match=r"padding_idx = 3, .* set its padding_idx to None"):
        funcprobe.bind(model)
    frozen = make_policy("qwen2", "all-linear")
    next(m for m in frozen.modules() if isinstance(m, torch.nn.Embedding)).padding_idx = 3
    funcprobe.bind(frozen)
