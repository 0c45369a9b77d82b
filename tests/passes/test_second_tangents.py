"""Second derivatives of tokens' statistics along a direction: differences, autograd, enumeration."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

import funcprobe
from funcprobe import InputError, TokenStats, tree
from funcprobe.autodiff import taylor, taylor_rules
from funcprobe.policy.layout import microbatches
from support.architectures import ARCHITECTURES, lora_config
from support.jets import BATCH, MASK, STEP, seconds
from support.policies import random_batch, random_like, tiny_policy


def difference_of_tangents(probe, batch, v, step):
    """d2/d eta2 of l and h from first-order forward mode at theta +- step v."""
    up, down = (probe.tangents(tree.axpy(s * step, v, probe.params), batch, v)[1] for s in (1, -1))
    return TokenStats(*((u - d) / (2 * step) for u, d in zip(up, down, strict=True)))


def relative(found, expected):
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


def architecture(name, adapter="all-linear"):
    """A policy in float64 whose adapter and biases have moved from zero."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        base = ARCHITECTURES[name]()
        model = get_peft_model(base, lora_config(name, adapter))
        for key, p in model.named_parameters():
            if p.requires_grad or key.endswith("bias"):
                p.data += 0.2 * torch.randn_like(p)
    return model.double().eval()


def test_values_first_and_second_derivatives_of_every_token(probe64, direction, jet):
    stats, first, second = jet
    assert relative(stats, probe64.token_stats(probe64.params, BATCH)) < 1e-13
    assert relative(first, probe64.tangents(probe64.params, BATCH, direction)[1]) < 1e-12
    # Truncation STEP^2 (third derivatives are of the size of second ones here), rounding 1e-12.
    assert relative(second, difference_of_tangents(probe64, BATCH, direction, STEP)) < 1e-6
    for x in (*stats, *first, *second):
        assert not x[~MASK].any()


def test_second_tangents_of_a_plain_second_difference_of_values(probe64, direction, jet):
    """Without any derivative by torch: (f(e) - 2 f(0) + f(-e)) / e^2, rounding 1e-15 / e^2 = 1e-9."""
    e = 1e-3
    up, here, down = (
        probe64.token_stats(tree.axpy(s * e, direction, probe64.params), BATCH) for s in (1, 0, -1)
    )
    found = [(u - 2 * h + d) / e**2 for u, h, d in zip(up, here, down, strict=True)]
    assert relative(jet[2], found) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name):
    """GPT-2 among them, whose layer_norm has wrong nested forward mode in torch 2.13."""
    probe = funcprobe.bind(architecture(name), max_tokens=64)
    v = tree.scale(0.02, random_like(probe.params))
    batch = random_batch([(0, 3, 4), (1, 5, 3)])
    with torch.no_grad():  # in which nested forward mode would not work
        _, first, second = seconds(probe, batch, v)
    assert relative(first, probe.tangents(probe.params, batch, v)[1]) < 1e-11
    # As above; Gemma's caps bend more.
    assert relative(second, difference_of_tangents(probe, batch, v, STEP)) < 1e-5


def test_experts_that_are_added_up_in_place():
    """Which no rule can follow, so that the model goes by nested jvp whole."""
    config = MixtralConfig(
        **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4},
        initializer_range=0.3,
        experts_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = get_peft_model(
            MixtralForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
    probe = funcprobe.bind(model.double().eval(), max_tokens=64)
    v = tree.scale(0.02, random_like(probe.params))
    batch = random_batch([(0, 3, 4), (1, 5, 3)])
    _, first, second = seconds(probe, batch, v)
    assert relative(first, probe.tangents(probe.params, batch, v)[1]) < 1e-11
    assert relative(second, difference_of_tangents(probe, batch, v, STEP)) < 1e-6


@pytest.mark.parametrize("adapter", ["trained-norms", "trained-biases"])
def test_layer_norm_whose_own_weights_are_trained(adapter):
    probe = funcprobe.bind(architecture("gpt2", adapter), max_tokens=64)
    v = tree.scale(0.02, random_like(probe.params))
    batch = random_batch([(0, 3, 4), (1, 5, 3)])
    second = seconds(probe, batch, v)[2]
    assert relative(second, difference_of_tangents(probe, batch, v, STEP)) < 1e-5


@pytest.mark.parametrize("adapter", ["trained-head", "lora-head"])
def test_a_head_that_moves(adapter):
    """Whose own weights and whose hidden states both do."""
    probe = funcprobe.bind(architecture("qwen2", adapter), max_tokens=64)
    assert probe.forward.readout is None
    v = tree.scale(0.02, random_like(probe.params))
    batch = random_batch([(0, 3, 4), (1, 5, 3)])
    second = seconds(probe, batch, v)[2]
    assert relative(second, difference_of_tangents(probe, batch, v, STEP)) < 1e-6


@pytest.mark.parametrize("affine", [True, False])
def test_plain_layer_norm_is_layer_norm(affine):
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    norm = torch.nn.LayerNorm((4, 5), eps=0.1, elementwise_affine=affine, dtype=torch.float64)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    found = taylor_rules._layer_norm(x, (4, 5), norm.weight, norm.bias, 0.1)
    torch.testing.assert_close(found, norm(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_nested_forward_mode_is_refused(monkeypatch, dtype):
    """torch's own layer_norm, were it not replaced."""
    probe = funcprobe.bind(architecture("gpt2").to(dtype), max_tokens=64)
    v = tree.scale(0.02, random_like(probe.params))
    seconds(probe, BATCH, v)
    monkeypatch.setattr(taylor, "COMPOSED", {})
    with pytest.raises(InputError, match=r"second derivatives .* differ from a symmetric difference"):
        seconds(probe, BATCH, v)


class Unseen(torch.autograd.Function):
    """sin(c x), whose body Taylor mode does not see, so that all derivatives are 0 there."""

    @staticmethod
    def forward(x, c):
        with torch._C.DisableTorchFunctionSubclass():
            return (c * x).sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.c = inputs
        ctx.save_for_forward(x)

    @staticmethod
    def jvp(ctx, tangent, _):
        return ctx.c * (ctx.c * ctx.saved_tensors[0]).cos() * tangent


def spoilt(forward, spoil, where):
    """The policy with its logits or hidden states through a function."""
    if where == "logits":
        logits = forward.logits
        return forward._replace(logits=lambda p, h: spoil(logits(p, h)), readout=None)
    hidden = forward.hidden
    return forward._replace(hidden=lambda params, rows: spoil(hidden(params, rows)))


@pytest.mark.parametrize("where", ["logits", "hidden states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_that_are_not_seen_are_refused(dtype, where):
    probe = funcprobe.bind(tiny_policy(dtype=dtype), max_tokens=64)
    v = tree.scale(0.05, random_like(probe.params))
    wrong = spoilt(probe.forward, lambda x: Unseen.apply(x, 1.0), where)
    with pytest.raises(InputError, match=f"first derivatives of the {where} in Taylor mode are not"):
        funcprobe.second_tangents(probe.params, BATCH, v, wrong)


@pytest.mark.parametrize("where", ["logits", "hidden states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_derivative_of_false_zeros_is_refused(monkeypatch, dtype, where):
    """A rule without its bend, for a function of which the first derivative is right."""
    probe = funcprobe.bind(tiny_policy(dtype=dtype), max_tokens=64)
    v = tree.scale(0.05, random_like(probe.params))
    wrong = spoilt(probe.forward, torch.sin, where)
    funcprobe.second_tangents(probe.params, BATCH, v, wrong)

    def straight(jet):
        x, *parts = jet
        return taylor_rules.Jet(x.sin(), *(None if y is None else x.cos() * y for y in parts))

    monkeypatch.setitem(taylor_rules.RULES, torch.sin, straight)
    with pytest.raises(InputError, match=f"of the {where} in Taylor mode differ"):
        funcprobe.second_tangents(probe.params, BATCH, v, wrong)


class OnlyReverse(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    "spoil", [OnlyReverse.apply, lambda x: torch.native_layer_norm(x, (11,), None, None, 1e-5)[0]]
)
def test_a_model_without_derivatives_in_taylor_or_forward_mode_is_refused(probe64, direction, spoil):
    wrong = spoilt(probe64.forward, spoil, "logits")
    with pytest.raises(InputError, match="no derivatives in Taylor mode"):
        funcprobe.second_tangents(probe64.params, BATCH, direction, wrong)


def test_half_precision_is_refused():
    probe = funcprobe.bind(tiny_policy(dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"bfloat16 .* policy.dtype"):
        seconds(probe, BATCH, random_like(probe.params))


def test_float32_is_near_float64(probe64, direction, jet):
    probe = funcprobe.bind(tiny_policy(dtype=torch.float32))
    v = {n: t.float() for n, t in direction.items()}
    # Some twenty operations deep, float32 leaves 1e-5 of first derivatives, and twice that here.
    assert relative(seconds(probe, BATCH, v)[2], jet[2]) < 1e-4


@pytest.mark.parametrize("scale", [1e-7, 1e4])
def test_a_direction_of_any_length(probe64, direction, jet, scale):
    """The check's own step follows the direction; second derivatives are quadratic in it."""
    second = seconds(probe64, BATCH, tree.scale(scale, direction))[2]
    assert relative([x / scale**2 for x in second], jet[2]) < 1e-11


def test_a_direction_of_zeros_bends_nothing(probe64):
    _, first, second = seconds(probe64, BATCH, tree.zeros(probe64.params))
    assert not any(x.any() for x in (*first, *second))


def test_requires_grad_order_of_names_and_microbatches_change_nothing(probe64, direction, jet):
    leaves = {n: t.clone().requires_grad_() for n, t in probe64.params.items()}
    backwards = dict(reversed(direction.items()))
    found = funcprobe.second_tangents(leaves, BATCH, backwards, probe64.forward, 8)
    assert len(microbatches(BATCH, 8)) > 3
    for x, y in zip(itertools.chain(*found), itertools.chain(*jet), strict=True):
        assert not x.requires_grad
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def test_other_names_are_refused(probe64, direction):
    wrong = dict(itertools.islice(direction.items(), 3))
    with pytest.raises(ValueError, match="lora_A"):
        seconds(probe64, BATCH, wrong)
