"""A 4-bit base: the logits of its dequantised weights to the bit, their derivatives, and the refusals.

bitsandbytes runs on the CPU here, so that the base is quantised and read by its own code.
"""

import re
import weakref
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from torch.func import grad, jvp, vjp, vmap
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import funcprobe
from funcprobe.adapters.checkpoint import quantised
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.checkpoint.quantised import FrozenLinear4bit, freeze_quantised
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.trainers import ProbeCallback
from funcprobe.policy.layout import microbatches
from funcprobe.types import InputError
from support.architectures import (
    BATCH,
    CPU,
    central_difference,
    lora_config,
    same_shapes_logits,
    save_adapter,
    save_base,
    three_routes,
)
from support.checkpoints import character_tokenizer, edit_json, sets
from support.policies import random_batch, random_like
from support.trainers import plain_trainer, probe_config

slow = partial(pytest.param, marks=pytest.mark.slow)  # their linears are llama's
CASES = [
    ("qwen2", "all-linear"),  # with biases
    ("llama", "all-linear"),
    slow("gemma", "all-linear"),
    slow("gemma2", "all-linear"),
    slow("gemma3", "all-linear"),
    slow("mistral-window", "all-linear"),
    ("gpt2", "all-linear"),  # Conv1D, whose weights are transposed
    slow("llama", "lora-head"),
    ("llama", "lora-embedding"),
    slow("llama", "trained-head"),
    slow("llama", "trained-norms"),
    slow("llama", "trained-tokens"),
    ("llama", "lora-bias"),
    ("qwen2", "trained-biases"),  # those of the 4-bit layers themselves
]


def nf4(**changes):
    return BitsAndBytesConfig(
        **{
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
            **changes,
        }
    )


def load_4bit(folder, **changes):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4(**changes)
    )


def load_dequantised(folder):
    """The plain base with the numbers that the 4 bits stand for: no bitsandbytes in its forward."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, layer in load_4bit(folder).named_modules():
        if isinstance(layer, Linear4bit):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            mine = plain.get_submodule(name)
            mine.weight.data.copy_(weight if isinstance(mine, torch.nn.Linear) else weight.T)
    return plain


def exact(model):
    """Eval mode, but for the 4-bit layers: bitsandbytes 0.50 in eval mode on a CPU with AVX512-BF16
    repacks their weights in place and rounds their inputs to bfloat16 (they have no dropout)."""
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()
    return model


def load(folder, **changes):
    given = {"checkpoint": str(folder), "mode": "qlora", **changes}
    return load_policy(PolicyConfig.model_validate(given), CPU)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def folder(architecture):
        if architecture not in made:
            made[architecture] = save_base(architecture, tmp_path_factory.mktemp("base"))
        return made[architecture]

    return folder


@pytest.fixture
def trained(bases, tmp_path):
    """An adapter trained on a 4-bit Llama."""
    base = bases("llama")
    save_adapter(load_4bit(base), lora_config("llama", "all-linear"), base, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(("architecture", "adapter"), CASES)
def test_logits_and_derivatives(bases, tmp_path, architecture, adapter):
    base = bases(architecture)
    config = lora_config(architecture, adapter)
    theirs = save_adapter(load_4bit(base), config, base, tmp_path)
    policy = load(tmp_path)
    names = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert policy.params.keys() == names
    assert any(isinstance(m, FrozenLinear4bit) for m in policy.model.modules())
    assert not any(isinstance(m, Linear4bit) for m in policy.model.modules())
    on_plain = PeftModel.from_pretrained(load_dequantised(base), tmp_path, is_trainable=True).eval()
    on_4bit = PeftModel.from_pretrained(load_4bit(base), tmp_path)
    for reference in (on_plain, exact(on_4bit)):
        ours_NLV, theirs_NLV = same_shapes_logits(policy.model, reference)
        assert torch.equal(ours_NLV, theirs_NLV)
    # 4 bits matter: the base as it was is another policy.
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    assert float((same_shapes_logits(policy.model, full)[1] - ours_NLV).abs().max()) > 0.01

    v = random_like(policy.params)
    for module in on_plain.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # as loading has it
    # Tolerances as in test_architectures.py.
    ours = three_routes(funcprobe.bind(policy.model), v)
    ours.require_equal(1e-4)
    plain = three_routes(funcprobe.bind(on_plain), v)
    assert ours.forward == pytest.approx(plain.forward, abs=1e-5 * plain.size)
    assert ours.reverse == pytest.approx(plain.reverse, abs=1e-5 * plain.size)
    # float64 arithmetic on the weights as dequantised in float32.
    probe = funcprobe.bind(load(tmp_path, dtype="float64").model)
    wide = three_routes(probe, v)
    wide.require_equal(1e-12)
    measured = central_difference(probe, v, 1e-6)
    assert measured == pytest.approx(wide.forward, abs=1e-6 * wide.size)
    assert ours.forward == pytest.approx(wide.forward, abs=1e-4 * wide.size)


def test_second_derivatives_are_those_of_the_dequantised_base(bases, trained):
    """Forward over forward through the 4-bit layers, in float64, where nothing rounds below 1e-13."""
    quantised = funcprobe.bind(load(trained, dtype="float64").model)
    on_plain = PeftModel.from_pretrained(load_dequantised(bases("llama")), trained, is_trainable=True)
    plain = funcprobe.bind(on_plain.double().eval())
    v = random_like(quantised.params)
    batch = random_batch([(0, 2, 3), (1, 3, 4)])
    ours, theirs = (probe.second_tangents(probe.params, batch, v) for probe in (quantised, plain))
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert float((a - b).norm()) < 1e-9 * float(b.norm())


@pytest.mark.parametrize("double", [True, False])
def test_a_base_that_was_saved_in_nf4(bases, trained, tmp_path, double):
    base = load_4bit(bases("llama"), bnb_4bit_use_double_quant=double)
    base.save_pretrained(tmp_path / "nf4")
    character_tokenizer().save_pretrained(tmp_path / "nf4")
    policy = load(trained, base=str(tmp_path / "nf4"))
    fresh = load_4bit(bases("llama"), bnb_4bit_use_double_quant=double)
    reference = exact(PeftModel.from_pretrained(fresh, trained))
    assert torch.equal(*same_shapes_logits(policy.model, reference))
    if double:
        assert torch.equal(*same_shapes_logits(policy.model, load(trained).model))
    with pytest.raises(InputError, match=r'quantised .bitsandbytes nf4.: set policy.mode = "qlora"'):
        load(trained, base=str(tmp_path / "nf4"), mode="lora")


def test_an_adapter_trained_on_4_bits_loads_on_the_plain_base(bases, trained):
    policy = load(trained, mode="lora")
    plain = AutoModelForCausalLM.from_pretrained(bases("llama"))
    reference = PeftModel.from_pretrained(plain, trained).eval()
    assert torch.equal(*same_shapes_logits(policy.model, reference))
    in_4bit = load(trained)
    assert list(in_4bit.params) == list(policy.params)
    assert all(torch.equal(in_4bit.params[n], t) for n, t in policy.params.items())


def test_parameters_are_counted_as_what_they_hold(bases, trained):
    count = AutoModelForCausalLM.from_pretrained(bases("llama")).num_parameters()
    assert f"{count:,} parameters, nf4 in float32" in load(trained).lines[0]
    trainable = sum(t.numel() for t in load(trained).params.values())
    load(trained, max_trainable=trainable)
    with pytest.raises(InputError, match=f"{trainable:,} parameters .* more than policy.max_trainable"):
        load(trained, max_trainable=trainable - 1)


def test_bfloat16(bases, trained):
    policy = load(trained, dtype="bfloat16")
    assert {p.dtype for p in policy.model.get_base_model().lm_head.parameters()} == {torch.bfloat16}
    base = AutoModelForCausalLM.from_pretrained(
        bases("llama"),
        dtype=torch.bfloat16,
        quantization_config=nf4(bnb_4bit_compute_dtype=torch.bfloat16),
    )
    reference = exact(PeftModel.from_pretrained(base, trained))
    assert torch.equal(*same_shapes_logits(policy.model, reference))
    # bfloat16 rounds to one part in 256, some hundred times.
    three_routes(funcprobe.bind(policy.model), random_like(policy.params)).require_equal(0.1)


def test_a_gradient_holds_no_dequantised_weight(trained, monkeypatch):
    policy = load(trained)
    forward = funcprobe.bind(policy.model).forward
    made = []

    def remembering(*args):
        weight = dequantize_4bit(*args)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", remembering)
    (rows,) = microbatches(BATCH, 64)
    hidden_TD, pull = vjp(lambda params: forward.hidden(params, rows), policy.params)
    assert len(made) == 14
    assert not any(weight() is not None for weight in made)
    (grads,) = pull(torch.ones_like(hidden_TD))
    assert all(bool(g.any()) for g in grads.values())
    assert len(made) > 20  # made again, not found


def test_one_gradient_a_sequence_by_vmap(trained):
    """vmap(grad) composes with the frozen layers, too, their biases included."""
    torch.manual_seed(0)
    layer = Linear4bit(32, 48, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    frozen = FrozenLinear4bit(layer)
    x_N32, scale_32 = torch.randn(5, 7, 32), torch.randn(32)

    def loss(scale, x):
        return frozen(scale * x).tanh().sum()

    together = vmap(grad(loss), (None, 0))(scale_32, x_N32)
    apart = torch.stack([grad(loss)(scale_32, x) for x in x_N32])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    weight = frozen.weight

    def plain(scale, x):
        return torch.nn.functional.linear(scale * x, weight, layer.bias).tanh().sum()

    expected = torch.stack([grad(plain)(scale_32, x) for x in x_N32])
    torch.testing.assert_close(apart, expected, rtol=1e-5, atol=1e-5)
    # Forward over reverse: the tangent of the backward's product, with W and not with W'.
    direction_32 = torch.randn(32)
    ours, theirs = (
        jvp(grad(partial(of, x=x_N32)), (scale_32,), (direction_32,))[1] for of in (loss, plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))
    assert theirs.any()


def test_a_4_bit_model_at_hand(bases):
    """In a notebook: refused by bind as it is, bound once its layers are replaced, before a forward."""
    model = get_peft_model(load_4bit(bases("llama")), lora_config("llama", "all-linear")).eval()
    with pytest.raises(InputError, match=r"Params4bit of torch.uint8.*freeze_quantised\(model\)"):
        funcprobe.bind(model)
    freeze_quantised(model)
    funcprobe.bind(model)
    packed = get_peft_model(load_4bit(bases("llama")), lora_config("llama", "all-linear"))
    layer = next(m for m in packed.modules() if isinstance(m, Linear4bit))
    # What a forward in eval mode does where the CPU has AVX512-BF16.
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match=r"repacked the 4-bit weight.*load the model again"):
        freeze_quantised(packed)


@pytest.mark.slow
def test_in_a_trainer(bases, checkpoint, tmp_path):
    """Probed once its layers are replaced; refused before the first step where they are not."""
    for frozen in (False, True):
        model = get_peft_model(load_4bit(bases("llama")), lora_config("llama", "all-linear"))
        if frozen:
            freeze_quantised(model)
        trainer = plain_trainer(checkpoint, tmp_path, max_steps=1, gradient_checkpointing=False)
        trainer.model = trainer.model_wrapped = model
        trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
        if not frozen:
            with pytest.raises(InputError, match=r"freeze_quantised\(model\) before binding"):
                trainer.train()
            assert trainer.state.global_step == 0
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "funcprobe/predicted" in e]
    # The quadratic term and the noise of B_E = 12 leave the first order this close at lr = 1e-3.
    assert entry["funcprobe/measured"] == pytest.approx(entry["funcprobe/predicted"], rel=0.2)


@pytest.mark.parametrize(
    ("saved", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes fp4"),
    ],
)
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_other_quantisations_are_refused_by_name(tmp_path, trained, mode, saved, kind):
    base = save_base("llama", tmp_path / "other")
    edit_json(base / "config.json", quantization_config=saved)
    with pytest.raises(InputError, match=rf"is quantised \({kind}\).*policy.base to the unquantised"):
        load(trained, base=str(base), mode=mode)


def test_without_bitsandbytes(trained, monkeypatch):
    def found(name):
        return None if name == "bitsandbytes" else find_spec(name)

    monkeypatch.setattr(quantised, "find_spec", found)
    with pytest.raises(InputError, match=r'needs bitsandbytes: pip install "funcprobe\[qlora\]"'):
        load(trained)
    load(trained, mode="lora")


@pytest.mark.slow
def test_a_run(command, checkpoint, tmp_path):
    """The whole probe on a 4-bit base; what was sampled from the plain base is not taken for it."""
    (tmp_path / "c.toml").touch()
    given = checkpoint.settings() | {"optimizer.rule": "adamw"}
    folder = tmp_path / "runs" / ".stages"

    def run(**more):
        outcome = command("run", "c.toml", *sets(given | more))
        assert outcome.status == 0, outcome.err
        assert re.search(r"sanity checks: \d+ of \d+ passed", outcome.out)
        assert "FAIL" not in outcome.out
        return outcome.err, {path for path in folder.rglob("*") if path.is_file()}

    qlora = {"policy.mode": "qlora"}
    (_, plain), (said, both), (_, again) = run(), run(**qlora), run(**qlora)
    assert "nf4 in float64" in said
    assert len(both) == 2 * len(plain)
    assert again == both
