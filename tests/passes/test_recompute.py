"""Gradients that compute layers again: the ordinary ones to the bit, with one layer's activations."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2Config, Qwen2ForCausalLM

import funcprobe
from funcprobe import tree, unlayered
from funcprobe.policy.dropout import masked_forwards
from funcprobe.policy.forward import frozen_forward, trainable_params
from funcprobe.policy.layers import LayerByLayer, NotLayeredError, layered
from support.architectures import ARCHITECTURES, BATCH, P_NR, Q_NR, SHAPE, make_policy
from support.policies import random_like

LAYOUTS = ("plain", "packed", "shared")
CASES = [
    *((a, "all-linear", "packed") for a in ARCHITECTURES),
    *(("qwen2", "all-linear", layout) for layout in ("plain", "shared")),
    *(("qwen2", a, "shared") for a in ("trained-head", "trained-embedding", "trained-norms")),
]


def pair(model, layout="shared"):
    """(registry, ordinary forward, the same with recomputation)."""
    params = trainable_params(model)
    forward = frozen_forward(model, params, layout=layout)
    return params, forward, forward._replace(recompute=True)


def require_same(a, b):
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


@pytest.mark.parametrize(("architecture", "adapter", "layout"), CASES)
def test_the_gradient_is_that_without_recomputation(architecture, adapter, layout):
    params, plain, again = pair(make_policy(architecture, adapter), layout)
    expected = funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, plain)
    found = funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, again)
    require_same(found, expected)
    assert all(bool(g.any()) for g in found.values())
    # Another route altogether: forward mode.
    v = random_like(params)
    _, along = funcprobe.tangents(params, BATCH, v, plain)
    expected = float((P_NR * along.logp_NR + Q_NR * along.entropy_NR).sum())
    assert tree.dot(found, v) == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_all_parameters_of_a_policy():
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).double().eval()
    model.get_input_embeddings().padding_idx = None
    params, plain, again = pair(model)
    grads = [funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, f) for f in (again, plain)]
    require_same(*grads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contractions_compute_the_layers_again_or_take_tangents(layout):
    params, plain, again = pair(make_policy(), layout)
    mu = random_like(params)
    (s_N, grads), (expected_N, expected) = (
        funcprobe.grad_dots(params, BATCH, mu, f, p_NR=P_NR, q_NR=Q_NR) for f in (again, plain)
    )
    require_same(grads, expected)
    torch.testing.assert_close(s_N, expected_N, rtol=1e-13, atol=1e-13)
    alpha_N = funcprobe.alpha_vjp(params, BATCH, mu, again, p_NR=P_NR, q_NR=Q_NR)
    torch.testing.assert_close(alpha_N, expected_N, rtol=1e-9, atol=1e-11)


def test_masks_of_dropout_are_those_of_the_first_computation():
    model = make_policy()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "lora_dropout"):
            for name in getattr(module, "lora_dropout", {}):
                module.lora_dropout[name] = nn.Dropout(0.3)
    params, plain, again = pair(model.eval())
    masked, masked_again = (masked_forwards(model, params, f, 2, seed=5)[1] for f in (plain, again))
    found = funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, masked_again)
    require_same(found, funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, masked))
    unmasked = funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, plain)
    assert any(not torch.equal(found[n], unmasked[n]) for n in found)


def most_saved(layers, recompute):
    """Numbers that autograd holds at once at its highest."""
    torch.manual_seed(1)
    config = Qwen2Config(**SHAPE | {"num_hidden_layers": layers})
    params, *forwards = pair(make_policy(base=Qwen2ForCausalLM(config)), "plain")
    held, most = [0], [0]

    class Packed:
        def __init__(self, tensor):
            self.tensor = tensor

    def let_go(count):
        held[0] -= count

    def pack(tensor):
        if isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf):
            return tensor
        packed, count = Packed(tensor), tensor.numel()
        held[0] += count
        most[0] = max(most[0], held[0])
        weakref.finalize(packed, partial(let_go, count))
        return packed

    with saved_tensors_hooks(pack, lambda x: x.tensor if isinstance(x, Packed) else x):
        funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, forwards[recompute])
    return most[0]


def test_activations_of_one_layer_are_held():
    input_of_layer = 4 * 7 * SHAPE["hidden_size"]  # sequences, tokens, features
    growth = [(most_saved(6, again) - most_saved(3, again)) / 3 for again in (True, False)]
    assert growth[0] <= input_of_layer
    assert growth[1] > 8 * input_of_layer


def test_the_model_is_not_touched_even_by_an_error():
    model = make_policy()
    params, _, again = pair(model)
    before = {n: (id(p), p._version, p.requires_grad, p.grad) for n, p in model.named_parameters()}
    states = {n: dict(vars(m)) for n, m in model.named_modules()}
    funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, again)
    calls = []

    def fails(module, args):
        calls.append(module)
        if len(calls) == 2:  # in the backward pass
            raise ValueError("in the second computation")

    inner = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
    with (
        inner.register_forward_pre_hook(fails),
        pytest.raises(ValueError, match="second"),
    ):
        funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, again)
    after = {n: (id(p), p._version, p.requires_grad, p.grad) for n, p in model.named_parameters()}
    assert after == before
    for name, module in model.named_modules():
        assert vars(module).keys() == states[name].keys()
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("primitive", ["weighted_grad", "grad_dots", "alpha_vjp"])
def test_a_single_sequence_that_does_not_fit_is_computed_again(primitive, monkeypatch):
    params, plain, _ = pair(make_policy(), "plain")
    mu, said = random_like(params), []

    def hidden(given, rows):
        stack = torch.overrides._get_current_function_mode_stack()
        small = any(type(m).__name__ in {"LayerByLayer", "ForwardMode"} for m in stack)
        if not small and rows.tokens > 6 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain.hidden(given, rows)

    # A model that can, without its trial on tokens that do not fit this device either.
    monkeypatch.setattr("funcprobe.passes.gradients.unlayered", lambda *_: None)
    monkeypatch.setattr("funcprobe.passes.grad_dots.unlayered", lambda *_: None)
    scarce = plain._replace(hidden=hidden, recomputing=lambda: said.append("recomputing"))
    calls = {
        "weighted_grad": lambda f: funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, f),
        "grad_dots": lambda f: funcprobe.grad_dots(params, BATCH, mu, f)[1],
        "alpha_vjp": lambda f: {"s": funcprobe.alpha_vjp(params, BATCH, mu, f)},
    }
    found, expected = (calls[primitive](f) for f in (scarce, plain))
    assert said == ["recomputing"]
    for n, t in expected.items():
        torch.testing.assert_close(found[n], t, rtol=1e-9, atol=1e-10)


def test_models_whose_layers_cannot_be_computed_again_are_told(monkeypatch):
    model = make_policy()
    params, plain, again = pair(model)
    assert unlayered(params, plain) is None
    seen = []

    def channel(own, *args, **kwargs):
        """What a layer left outside of its outputs enters the next one's."""
        out = type(own).forward(own, *args, **kwargs)
        seen.append(out)
        return out if len(seen) % 2 else out + seen[-2]

    layers = next(m for n, m in model.named_modules() if n.endswith("layers"))
    for layer in layers:
        monkeypatch.setattr(layer, "forward", partial(channel, layer), raising=False)
    reason = unlayered(params, again)
    assert reason is not None
    assert "gradients differ" in reason


def test_a_weight_that_a_layer_has_twice_is_counted_once():
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).double().eval()
    model.get_input_embeddings().padding_idx = None
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    params, plain, again = pair(model)
    grads = [funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, f) for f in (again, plain)]
    for name, expected in grads[1].items():
        torch.testing.assert_close(grads[0][name], expected, rtol=1e-12, atol=1e-12)
    assert unlayered(params, plain) is None


def test_memory_that_is_out_for_the_trial_as_well_is_the_error():
    params, plain, _ = pair(make_policy())
    calls = []

    def hidden(given, rows):
        calls.append(rows)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, plain._replace(hidden=hidden))
    assert len(calls) < 10  # halved, and tried once: no trial within the trial


def test_a_registry_without_effect_on_the_trial_can_be_computed_again():
    model = make_policy(adapter="all-linear")
    params, plain, _ = pair(model)
    still = plain._replace(
        logits=lambda given, hidden_TD: 0 * plain.logits(given, hidden_TD), readout=None
    )
    assert unlayered(params, still) is None


class Writes(nn.Module):
    """A layer that adds to its argument in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return x.add_(self.linear(x))


class OfWriters(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Writes(), Writes()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_write_into_their_argument_are_refused():
    with LayerByLayer(), pytest.raises(NotLayeredError, match="Writes changes its arguments"):
        layered(OfWriters())(torch.ones(2, 3))


class Shared(nn.Module):
    """A layer that passes its keys on in a dict, as Gemma 3n's do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, shared):
        shared["key"] = self.linear(x)
        return x + shared["key"]


class Other(Shared):
    """Of another type."""


class OfShared(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x):
        shared = {}
        for layer in self.layers:
            x = layer(x, shared)
        return x


def test_layers_that_change_their_arguments_are_refused():
    x = torch.ones(2, 3)
    backbone = OfShared([Shared, Shared])
    assert layered(backbone) is backbone
    with LayerByLayer(), pytest.raises(NotLayeredError, match="Shared changes its arguments"):
        layered(backbone)(x)
    for kinds in ([Shared], [Shared, Other]):
        with LayerByLayer(), pytest.raises(NotLayeredError, match="no list of layers of one type"):
            layered(OfShared(kinds))
