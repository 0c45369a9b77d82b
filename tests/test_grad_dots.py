"""<grad f_n, mu> from one backward pass, against a loop of gradients and the alpha trick."""

import sys

import pytest
import torch
from architectures import ADAPTERS, ARCHITECTURES, TIED
from conftest import random_batch, random_like, tiny_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import make_policy

import funcprobe
from funcprobe import response_mask, select, tree
from funcprobe.passes.grad_dots import grad_dots
from funcprobe.policy.forward import frozen_forward, trainable_params

LENGTHS = [(0, 3, 4), (1, 5, 1), (2, 1, 6), (0, 3, 2), (0, 3, 1)]
BATCH = random_batch(LENGTHS, vocabulary=14, seed=5)
# Token 0 is the embeddings' padding_idx, whose row has no gradient in reverse mode.
BATCH = BATCH._replace(tokens_NL=BATCH.tokens_NL.clamp(min=1))
MASK_NR = response_mask(BATCH).double()
P_NR = random_like({"p": MASK_NR}, seed=2)["p"] * MASK_NR
Q_NR = random_like({"q": MASK_NR}, seed=3)["q"] * MASK_NR

# Linear layers of the backbone and nothing else: these need no second pass.
ONE_PASS = {"all-linear", "rslora", "patterns", "lora-bias"}
BIASED = {"trained-biases", "biases-of-lora"}  # of linear layers too, where these have one
FIRST = {("qwen2", a) for a in ADAPTERS} | {(a, "all-linear") for a in ARCHITECTURES}
CASES = [
    pytest.param(a, b, tied, marks=() if (a, b) in FIRST and not tied else pytest.mark.slow)
    for a in ARCHITECTURES
    for b in ADAPTERS
    for tied in ((False, True) if b in TIED else (False,))
]


def bound_forward(architecture="qwen2", adapter="all-linear", dtype=torch.float64, **options):
    layout = options.pop("layout", "shared")
    model = make_policy(architecture, adapter, dtype, **options)
    params = trainable_params(model)
    return params, frozen_forward(model, params, layout=layout)


def loop(params, batch, p_NR, q_NR, mu, forward):
    """Gradients of one sequence at a time, alone in its batch."""
    s, total = [], tree.zeros(params, torch.float64)
    for i in range(len(p_NR)):
        one, count = select(batch, torch.tensor([i])), int(batch.response_length_N[i])
        p, q = (x[i : i + 1, :count] for x in (p_NR, q_NR))
        grads = funcprobe.weighted_grad(params, one, p, q, forward, 99)
        s.append(tree.dot(grads, mu))
        total = {n: t + grads[n].double() for n, t in total.items()}
    return torch.tensor(s, dtype=torch.float64), total


def require_equal(found, expected, tolerance):
    """Norm-wise, relative."""
    (s_N, grads), (expected_N, total) = found, expected
    assert s_N.dtype == torch.float64
    assert float((s_N - expected_N).norm()) <= tolerance * float(expected_N.norm())
    assert list(grads) == list(total)
    for name, t in grads.items():
        assert float((t.double() - total[name]).norm()) <= tolerance * float(total[name].norm()), name


@pytest.mark.parametrize(("architecture", "adapter", "tied"), CASES)
def test_every_adapter(monkeypatch, architecture, adapter, tied):
    params, forward = bound_forward(architecture, adapter, tied=tied)
    mu = random_like(params)
    passes = []

    def counted(*args):
        passes.append(args)
        return tangents(*args)

    module = sys.modules["funcprobe.passes.grad_dots"]  # the package has the function by this name
    tangents = module.tangents
    monkeypatch.setattr(module, "tangents", counted)
    expected = loop(params, BATCH, P_NR, Q_NR, mu, forward)
    assert int((expected[0].abs() > 1e-2 * expected[0].abs().max()).sum()) >= 3
    alpha_N = funcprobe.alpha_vjp(params, BATCH, mu, forward, 99, p_NR=P_NR, q_NR=Q_NR)
    # Sums of some thousand terms of both signs.
    require_equal((alpha_N, expected[1]), expected, 1e-9)
    found = grad_dots(params, BATCH, mu, forward, 20, p_NR=P_NR, q_NR=Q_NR)
    require_equal(found, expected, 1e-10)
    # In one pass, where only linear layers are trained.
    if adapter not in BIASED:
        assert bool(passes) is (adapter not in ONE_PASS)


def test_one_layer_that_is_both_wide_and_narrow_counts_once():
    """What is trained has more rows than columns, fewer, as many, a bias; each by itself."""
    params, forward = bound_forward("qwen2", "lora-bias")
    mu, zero = random_like(params), tree.zeros(params)
    found_N = torch.zeros(len(LENGTHS)).double()
    for name in params:
        one = {**zero, name: mu[name]}
        s_N, _ = grad_dots(params, BATCH, one, forward, p_NR=P_NR, q_NR=Q_NR)
        expected_N, _ = loop(params, BATCH, P_NR, Q_NR, one, forward)
        assert float((s_N - expected_N).norm()) <= 1e-10 * float(expected_N.norm()), name
        assert s_N.any(), name
        found_N += s_N
    s_N, _ = grad_dots(params, BATCH, mu, forward, p_NR=P_NR, q_NR=Q_NR)
    assert torch.allclose(s_N, found_N, rtol=1e-9)


@pytest.mark.parametrize("layout", ["plain", "packed", "shared"])
def test_layouts_and_microbatches(layout):
    params, forward = bound_forward(layout=layout)
    mu = random_like(params)
    expected = loop(params, BATCH, P_NR, Q_NR, mu, forward)
    for max_tokens in (8, 17, 200):
        found = grad_dots(params, BATCH, mu, forward, max_tokens, p_NR=P_NR, q_NR=Q_NR)
        require_equal(found, expected, 1e-10)


PARAMS, FORWARD = bound_forward()


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=7),
    st.integers(0, 40),
    st.booleans(),
)
def test_any_batch(pairs, room, defaults):
    """Prompts of 3 to 5 tokens that several share, repeated sequences among them."""
    batch = random_batch([(number, 3 + number, count) for number, count in pairs], vocabulary=14)
    again = torch.tensor([*range(len(pairs)), 0, 0])
    batch = select(batch, again)
    mask_NR = response_mask(batch).double()
    p_NR = mask_NR if defaults else random_like({"p": mask_NR}, seed=2)["p"] * mask_NR
    q_NR = 0 * mask_NR if defaults else random_like({"q": mask_NR}, seed=3)["q"] * mask_NR
    mu, weights = random_like(PARAMS), {} if defaults else {"p_NR": p_NR, "q_NR": q_NR}
    found = grad_dots(PARAMS, batch, mu, FORWARD, 11 + room, **weights)
    require_equal(found, loop(PARAMS, batch, p_NR, q_NR, mu, FORWARD), 1e-9)
    whole = funcprobe.weighted_grad(PARAMS, batch, p_NR, q_NR, FORWARD)
    assert float(found[0].sum()) == pytest.approx(
        tree.dot(whole, mu), abs=1e-9 * float(found[0].abs().sum())
    )
    if defaults:  # the same sequence has the same number
        assert torch.allclose(found[0][0], found[0][-2:], rtol=1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, bound):
    """A hundred roundings of 6e-8, of bfloat16's 0.4 %; the gradient is summed in float32."""
    exact = {}
    params, forward = bound_forward(dtype=dtype)
    mu = random_like(params)
    twin, forward64 = bound_forward()
    exact = {n: t.double() for n, t in params.items()}
    assert exact.keys() == twin.keys()
    expected = loop(exact, BATCH, P_NR, Q_NR, {n: t.double() for n, t in mu.items()}, forward64)
    s_N, grads = grad_dots(params, BATCH, mu, forward, p_NR=P_NR, q_NR=Q_NR)
    assert all(t.dtype == torch.float32 for t in grads.values())
    assert s_N.dtype == torch.float64
    assert float((s_N - expected[0]).norm()) < bound * float(expected[0].norm())
    ours = funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, forward)
    for name, t in grads.items():
        assert float((t - ours[name]).norm()) < bound * float(ours[name].norm())


def test_it_is_bound_to_the_probe():
    model = make_policy()
    probe = funcprobe.bind(model, max_tokens=20)
    mu = random_like(probe.params)
    s_N, grads = probe.grad_dots(probe.params, BATCH, mu)
    _, along = probe.tangents(probe.params, BATCH, mu)
    assert torch.allclose(s_N, along.logp_NR.sum(1), rtol=1e-9)
    Y = probe.weighted_grad(probe.params, BATCH, MASK_NR, 0 * MASK_NR)
    assert all(torch.allclose(grads[n], Y[n], rtol=1e-9, atol=1e-12) for n in Y)


def test_a_direction_of_other_names_is_refused():
    mu = random_like(PARAMS)
    first = next(iter(mu))
    for wrong in ({n: t for n, t in mu.items() if n != first}, {**mu, first: mu[first][:1]}):
        with pytest.raises(ValueError, match="lora_A"):
            grad_dots(PARAMS, BATCH, wrong, FORWARD)
    # Another order is no other direction.
    here, there = (grad_dots(PARAMS, BATCH, d, FORWARD) for d in (mu, dict(reversed(mu.items()))))
    assert torch.equal(here[0], there[0])


def outside(model, kind):
    """One trained weight [32, 2] has a part in the model beside its linear layer."""
    modules = dict(model.named_modules())
    layer = modules[next(name for name in modules if name.endswith("layers.1.mlp.down_proj"))]
    inner, lora_B = layer.forward, layer.lora_B["default"]
    layer.forward = {
        "added": lambda x: inner(x) + 0.1 * lora_B.weight.sum(),
        "multiplied": lambda x: inner(x) * (1 + 2 * lora_B.weight.square().mean()),
        "product": lambda x: inner(x) + x[..., :2] @ lora_B.weight.T,
    }[kind]


@pytest.mark.parametrize("kind", ["added", "multiplied", "product"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_weight_that_is_used_elsewhere_too_raises(kind, dtype):
    model = make_policy(dtype=dtype)
    outside(model, kind)
    params = trainable_params(model)
    forward = frozen_forward(model, params)
    mu = random_like(params)
    if dtype == torch.float64:  # the model is one that the other routes take
        expected_N, _ = loop(params, BATCH, P_NR, Q_NR, mu, forward)
        _, along = funcprobe.tangents(params, BATCH, mu, forward)
        s_N = (P_NR * along.logp_NR + Q_NR * along.entropy_NR).sum(1)
        assert float((s_N - expected_N).norm()) <= 1e-9 * float(expected_N.norm())
    with pytest.raises(RuntimeError, match=r"used outside linear layers; use tangents\(\)"):
        grad_dots(params, BATCH, mu, forward, p_NR=P_NR, q_NR=Q_NR)


def test_a_linear_layer_that_is_called_twice_is_right():
    """Weights that two places share are no use outside of linear layers."""
    model = make_policy()
    layers = model.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp
    params = trainable_params(model)
    forward = frozen_forward(model, params)
    mu = random_like(params)
    found = grad_dots(params, BATCH, mu, forward, p_NR=P_NR, q_NR=Q_NR)
    require_equal(found, loop(params, BATCH, P_NR, Q_NR, mu, forward), 1e-10)


def test_not_a_number_raises():
    """A sum that cannot be compared is no sum that agrees."""
    params = {n: t.clone() for n, t in PARAMS.items()}
    next(iter(params.values()))[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="nan"):
        grad_dots(params, BATCH, random_like(params), FORWARD)


def test_an_orthogonal_direction_is_no_misuse():
    """s_n is rounding where mu is orthogonal to the gradient, and no weight is used elsewhere."""
    probe = funcprobe.bind(tiny_policy(dtype=torch.float32))
    batch = random_batch([(0, 3, 4)])
    ones_NR = funcprobe.response_mask(batch).double()
    grads = probe.weighted_grad(probe.params, batch, ones_NR, 0 * ones_NR)
    mu = random_like(probe.params, seed=4)
    share = tree.dot(mu, grads) / tree.dot(grads, grads)
    mu = {n: (t.double() - share * grads[n].double()).float() for n, t in mu.items()}
    s_N, _ = probe.grad_dots(probe.params, batch, mu)
    # a sum of some thousand products in float32
    assert abs(float(s_N[0])) < 1e-4 * tree.norm(grads) * tree.norm(mu)


def test_a_model_that_flattens_its_tokens():
    model = tiny_policy(dtype=torch.float64)
    mlp = model.get_base_model().model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x.flatten(0, 1)).view(x.shape)
    probe = funcprobe.bind(model)
    batch, mu = random_batch([(0, 3, 4), (1, 2, 6), (2, 5, 2)]), random_like(probe.params, seed=4)
    s_N, _ = probe.grad_dots(probe.params, batch, mu)
    assert torch.allclose(s_N, probe.alpha_vjp(probe.params, batch, mu), rtol=1e-9)
