"""Forward mode of frozen linears and of attention: torch's own as oracle, products and bits."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import funcprobe
from funcprobe.autodiff import attention_along
from funcprobe.autodiff.forward_mode import ForwardMode
from funcprobe.autodiff.taylor import second_jvp
from funcprobe.autodiff.transforms import derivatives, in_transform
from funcprobe.policy.forward import frozen_forward, trainable_params
from funcprobe.policy.layout import microbatches
from funcprobe.policy.rows import packed_rows, plain_rows
from support.architectures import ADAPTERS, ARCHITECTURES, make_policy
from support.policies import random_batch, random_like


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(ours, theirs, tolerance=1e-12):
    """Norm-wise; sums of some ten terms of size 1."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float((a - b).norm()) <= tolerance * float(b.norm())


def twice(f, at, along):
    """(f, f', f' by the outer level, f'') along a straight line."""

    def first(*x):
        return jvp(f, x, along)

    (value, one), (again, two) = jvp(first, at, along)
    return value, one, again, two


def both(call):
    """(with the mode, without it) under MATH, the only one of torch's that has a forward mode."""
    with ForwardMode(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        ours = call()
    return ours, plain(call)


def plain(call):
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return call()


def dual(f, at, along):
    """(f, f') on forward_ad's level, as `tangents` works, with the mode and fused attention."""
    with torch.no_grad(), ForwardMode(), forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, at, along)))


# Linear layers: what is differentiated of x, W and b.

X, W, B = draw(2, 3, 5, seed=1), draw(4, 5, seed=2), draw(4, seed=3)
W_T = W.T.contiguous()  # as Conv1D has it
DX, DW, DB = draw(2, 3, 5, seed=4), draw(4, 5, seed=5), draw(4, seed=6)
TRAINED = {
    "input": (lambda x: linear(x, W, B), (X,), (DX,)),
    "input, no bias": (lambda x: linear(x, W), (X,), (DX,)),
    "by name": (lambda x: linear(input=x, weight=W, bias=B), (X,), (DX,)),
    "weight": (lambda w: linear(X, w, B), (W,), (DW,)),
    "bias": (lambda b: linear(X, W, b), (B,), (DB,)),
    "input and weight": (lambda x, w: linear(x, w, B), (X, W), (DX, DW)),
    "input and bias": (lambda x, b: linear(x, W, b), (X, B), (DX, DB)),
    "all": (linear, (X, W, B), (DX, DW, DB)),
    "Conv1D": (lambda x: torch.addmm(B, x.flatten(0, 1), W_T), (X,), (DX,)),
    "Conv1D, bias": (lambda x, b: torch.addmm(b, x.flatten(0, 1), W_T), (X, B), (DX, DB)),
    "scaled addmm": (lambda x: torch.addmm(B, x.flatten(0, 1), W_T, beta=2, alpha=3), (X,), (DX,)),
    "addmm by name": (lambda x: torch.addmm(B, mat1=x.flatten(0, 1), mat2=W_T), (X,), (DX,)),
    "layer in a layer": (lambda x: linear(linear(x.sin(), W, B), W.T).exp(), (0.1 * X,), (0.1 * DX,)),
}


@pytest.mark.parametrize("case", TRAINED)
def test_linear_layers(case):
    f, at, along = TRAINED[case]
    for call in (lambda: jvp(f, at, along), lambda: twice(f, at, along)):
        ours, theirs = both(call)
        close(ours, theirs)
    close(dual(f, at, along), plain(lambda: jvp(f, at, along)))
    # Reverse mode, and reverse of forward, where the mode is on.
    cotangent = draw(*f(*at).shape, seed=7)
    close(*both(lambda: vjp(f, *at)[1](cotangent)))
    close(*both(lambda: vjp(lambda *x: jvp(f, x, along)[1].sin(), *at)[1](cotangent)))
    close(*both(lambda: (torch.func.vmap(lambda *d: jvp(f, at, d)[1])(*(x[None] for x in along)),)))


PRODUCTS = {
    "both": (lambda a, b: a * b, (X, 2 + X), (DX, DX.flip(0))),
    "with itself": (lambda a: a * a, (X,), (DX,)),
    "broadcast": (lambda a, b: b * a, (X, X[0, :1]), (DX, DX[1, 1:2])),
    "of a function's": (lambda a: torch.mul(a.sin(), a.sum(-1, keepdim=True)), (X,), (DX,)),
    "by name": (lambda a: torch.mul(input=a, other=a.exp()), (X,), (DX,)),
    "one of them": (lambda a: a * X + X * a, (X,), (DX,)),
    "a number": (lambda a: 3 * a * 2, (X,), (DX,)),
    "another dtype": (lambda a: a * a.float(), (X,), (DX,)),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case):
    f, at, along = PRODUCTS[case]
    value, tangent = dual(f, at, along)
    assert value.equal(f(*at))
    close((value, tangent), plain(lambda: jvp(f, at, along)))
    close(*both(lambda: twice(f, at, along)))


def test_a_product_leaves_its_factors():
    a, b, da, db = (t.clone() for t in (X, 2 + X, DX, DX.flip(0)))
    dual(lambda x, y: (x * y) * x, (a, b), (da, db))
    for now, before in zip((a, b, da, db), (X, 2 + X, DX, DX.flip(0)), strict=True):
        assert now.equal(before)


class Operations(TorchDispatchMode):
    """Names of the operations that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("f", "most"),
    [
        (lambda a, b: a * b, 4),  # a b, a b', a' b and their sum
        (lambda a, _: a * X, 2),
        (lambda a, _: X * a, 2),
        (lambda a, _: a * 2.5, 2),
    ],
)
def test_a_product_adds_no_zeros(f, most):
    def counted(*x):
        with Operations() as seen:
            out = f(*x)
        computed.append([name for name in seen.names if name in ("mul", "add", "_to_copy")])
        return out

    computed: list[list[str]] = []
    dual(counted, (X, 2 + X), (DX, DX))
    assert len(computed[0]) == most, computed


def products(call) -> int:
    """Floating-point operations of matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_a_frozen_linear_takes_two_products():
    f, at, along = TRAINED["input"]
    one = products(lambda: f(*at))
    assert one == 2 * 6 * 5 * 4
    assert products(lambda: jvp(f, at, along)) == 3 * one  # torch's own, with a tangent of zeros
    with ForwardMode():
        assert products(lambda: jvp(f, at, along)) == 2 * one
        assert products(lambda: twice(f, at, along)) == 3 * one  # W x'' of a straight line is 0
        # What has a derivative of its own needs its product.
        f, at, along = TRAINED["input and weight"]
        assert products(lambda: jvp(f, at, along)) == 3 * one
        f, at, along = TRAINED["Conv1D"]
        assert products(lambda: jvp(f, at, along)) == 2 * one


def test_derivatives_counts_levels():
    counted = []

    def see(*x):
        counted.append([derivatives(t) for t in x])
        return x[0].sin() * x[-1].sum()

    x, y = draw(3), draw(3, seed=1)
    see(x, y)
    jvp(lambda a: see(a, y), (x,), (x,))
    jvp(lambda a: jvp(lambda b: see(b, a, y), (a,), (a,))[1], (x,), (x,))
    vjp(lambda a: see(a, y), x)
    torch.func.vmap(lambda a: see(a, y))(x[:, None])
    torch.func.vmap(lambda a: jvp(lambda b: see(b, a, y), (a,), (a,))[1])(x[:, None])
    torch.func.grad(lambda a: torch.func.grad(lambda b: see(b, a).sum())(x).sum() * a.sum())(x)
    assert counted == [
        [0, 0],
        [1, 0],
        [2, 1, 0],
        [1, 0],
        [0, 0],
        [1, 0, 0],
        [1, 1],
    ]
    leaf = draw(3).requires_grad_()
    assert (derivatives(leaf), in_transform(leaf)) == (1, False)
    with torch.no_grad():
        assert derivatives(leaf) == 0
    counted.clear()
    torch.func.grad(lambda a: see(a, leaf).sum())(x)
    assert counted == [[1, 1]]
    with torch.autograd.forward_ad.dual_level():
        assert derivatives(torch.autograd.forward_ad.make_dual(x, y)) == 1


# Attention: [n, H, Q, d] with two heads of keys for four of queries where heads are grouped.

N, HEADS, Q, K, WIDTH = 3, 4, 5, 7, 6


def attention(heads: int, keys: int, **settings: Any):
    shapes = [(N, HEADS, Q, WIDTH), (N, heads, keys, WIDTH), (N, heads, keys, WIDTH)]
    at, along = (tuple(draw(*s, seed=seed + i) for i, s in enumerate(shapes)) for seed in (10, 20))
    return partial(scaled_dot_product_attention, **settings), at, along


def allowed(*shape):
    """A random mask, every query with a key of its own."""
    mask = draw(*shape, seed=9) > 0
    mask[..., 0] = True
    assert not mask.all()
    return mask


ATTENTION = {
    "whole": (HEADS, K, {}),
    "causal": (HEADS, Q, {"is_causal": True}),
    "causal, fewer queries": (HEADS, K, {"is_causal": True}),
    "boolean": (HEADS, K, {"attn_mask": allowed(N, 1, Q, K)}),
    "boolean, of one row": (HEADS, K, {"attn_mask": allowed(1, 1, Q, K)}),
    "boolean, of heads": (HEADS, K, {"attn_mask": allowed(N, HEADS, Q, K)}),
    "boolean, of two dimensions": (HEADS, K, {"attn_mask": allowed(Q, K)}),
    "boolean, of three": (HEADS, K, {"attn_mask": allowed(HEADS, Q, K)}),
    "additive": (HEADS, K, {"attn_mask": 2 * draw(N, 1, Q, K, seed=8)}),
    "additive, of one row": (HEADS, K, {"attn_mask": 2 * draw(1, 1, Q, K, seed=8)}),
    "-inf": (HEADS, K, {"attn_mask": torch.where(allowed(N, 1, Q, K), 0.0, -torch.inf).double()}),
    "scale": (HEADS, K, {"scale": 0.7}),
    "grouped": (2, K, {"enable_gqa": True}),
    "all of it": (2, K, {"enable_gqa": True, "scale": 1.3, "attn_mask": allowed(N, 1, Q, K)}),
    "one key head": (1, Q, {"enable_gqa": True, "is_causal": True}),
}


@pytest.mark.parametrize("scores", [2**22, 1, 8 * K * 2 * HEADS, 8 * K * Q * 2])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(monkeypatch, case, scores):
    """All at once; one query of one head; two queries of several heads; all of two heads or groups."""
    monkeypatch.setitem(attention_along.SCORES, "cpu", scores)
    heads, keys, settings = ATTENTION[case]
    f, at, along = attention(heads, keys, **settings)
    close(*both(lambda: jvp(f, at, along)))
    close(*both(lambda: twice(f, at, along)))
    close(dual(f, at, along), plain(lambda: jvp(f, at, along)))
    value, first, _, second = plain(lambda: twice(f, at, along))
    close(second_jvp(f, at, along), (value, first, second))
    # One of the three alone: the others have no tangent.
    for i in range(3):

        def of_one(x, i=i):
            return f(*at[:i], x, *at[i + 1 :])

        alone = at[i : i + 1], along[i : i + 1]
        close(*both(lambda of_one=of_one, alone=alone: jvp(of_one, *alone)))
        close(dual(of_one, *alone), plain(lambda of_one=of_one, alone=alone: jvp(of_one, *alone)))
    # The fused kernel's value, to the bit, where torch has no forward mode for it at all.
    with ForwardMode(), torch.no_grad():
        value, _ = jvp(f, at, along)
    assert torch.equal(value, f(*at))


def test_attention_by_position_and_without_derivatives():
    f, at, along = attention(HEADS, K)
    mask = allowed(N, 1, Q, K)
    close(*both(lambda: jvp(lambda *x: f(*x, mask, 0.0, False), at, along)))
    with ForwardMode():
        assert torch.equal(f(*at, mask), scaled_dot_product_attention(*at, mask))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_attention_in_lower_precision(dtype, bound):
    """A dozen roundings of 6e-8; of bfloat16's 0.4 %."""
    f, at, along = attention(2, K, enable_gqa=True, attn_mask=allowed(N, 1, Q, K))
    at, along = (tuple(x.to(dtype) for x in part) for part in (at, along))
    with ForwardMode(), torch.no_grad():
        value, tangent = jvp(f, at, along)
    assert value.dtype == tangent.dtype == dtype
    with sdpa_kernel(SDPBackend.MATH):
        _, exact = jvp(f, tuple(x.double() for x in at), tuple(x.double() for x in along))
    assert float((tangent.double() - exact).norm()) < bound * float(exact.norm())


# The whole model.

LENGTHS = [(0, 5, 4), (1, 7, 1), (0, 5, 1), (2, 1, 6), (0, 5, 7), (3, 2, 2), (1, 7, 3), (0, 5, 4)]
BATCH = random_batch(LENGTHS, vocabulary=14, seed=5)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(a, d, marks=() if d == torch.float32 or a == "qwen2" else pytest.mark.slow)
        for a in ARCHITECTURES
        for d in (torch.float32, torch.float64, torch.bfloat16)
    ],
)
def test_the_values_of_tangents_are_token_stats_to_the_bit(architecture, dtype):
    model = make_policy(architecture, dtype=dtype)
    params = trainable_params(model)
    shared = frozen_forward(model, params)
    for forward in {f.layout: f for f in (shared, shared._replace(layout="plain"))}.values():
        for max_tokens in (200, 26) if architecture == "qwen2" else (200,):
            at = (forward, max_tokens)
            stats, _ = funcprobe.tangents(params, BATCH, random_like(params), *at)
            for ours, theirs in zip(stats, funcprobe.token_stats(params, BATCH, *at), strict=True):
                assert torch.equal(ours, theirs)
                assert theirs.any()


@pytest.mark.parametrize(
    "adapter", ["all-linear", "trained-norms", "lora-head", "lora-embedding", "lora-bias"]
)
def test_the_values_of_tangents_with_other_adapters(adapter):
    assert adapter in ADAPTERS
    model = make_policy("llama", adapter, torch.float32)
    params = trainable_params(model)
    forward = frozen_forward(model, params)
    stats, tangent = funcprobe.tangents(params, BATCH, random_like(params), forward, 40)
    for ours, theirs in zip(stats, funcprobe.token_stats(params, BATCH, forward, 40), strict=True):
        assert torch.equal(ours, theirs)
    assert all(t.any() for t in tangent)


READ_EMBEDDINGS = tuple(
    f".0.{name}.base_layer.weight"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "attn.c_attn")
)


@pytest.mark.parametrize("make_rows", [plain_rows, packed_rows])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_tangents_take_two_forwards_of_the_frozen_layers(architecture, make_rows):
    """Operations of the backbone's products, exactly; fused attention on a CPU is not among them."""
    model = make_policy(architecture, dtype=torch.float32)
    params = trainable_params(model)
    forward, v = frozen_forward(model, params), random_like(params)
    rows = make_rows(BATCH, torch.arange(len(LENGTHS)))
    at = partial(forward.hidden, rows=rows)
    with torch.no_grad():
        once = products(lambda: at(params))
        with ForwardMode():
            ours = products(lambda: jvp(at, (params,), (v,)))
        with sdpa_kernel(SDPBackend.MATH):
            theirs = products(lambda: jvp(at, (params,), (v,)))
    layers = {n: p for n, p in model.named_parameters() if ".layers." in n or ".h." in n}
    frozen = (
        2 * rows.tokens * sum(p.numel() for n, p in layers.items() if n not in params and p.dim() == 2)
    )
    lora = 2 * rows.tokens * sum(t.numel() for t in params.values())
    rotary = once - frozen - lora  # angles: positions times frequencies
    assert 0 <= rotary < 0.01 * once
    if rows.packing is None:
        pairs = rows.tokens_NL.shape[0] * rows.tokens_NL.shape[1] ** 2
    else:
        pairs = sum(b.shape[0] * b.shape[1] ** 2 for b in rows.packing.blocks)
    width, count = 32, 2  # of all heads; layers
    attention = 2 * count * width * pairs
    # What reads the embeddings, which do not move, has one product.
    unmoved = 2 * rows.tokens * sum(p.numel() for n, p in layers.items() if n.endswith(READ_EMBEDDINGS))
    assert unmoved > 0.03 * frozen
    # Attention's tangent: scores again, a product of twice the width, E V and P V'.
    assert ours == 2 * frozen - unmoved + 3 * lora + 5 * attention + rotary
    assert theirs > ours + 0.8 * (frozen - unmoved)  # torch's third product


def test_tangents_without_modes_left_behind():
    """A call that fails in the middle leaves the functions as they were."""
    model = make_policy()
    params = trainable_params(model)
    forward = frozen_forward(model, params)

    def fail(*_, **__):
        raise ZeroDivisionError

    broken = forward._replace(hidden=fail)
    with pytest.raises(ZeroDivisionError):
        funcprobe.tangents(params, BATCH, params, broken)
    (rows,) = microbatches(BATCH, 200, "packed")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="forward AD"):
        jvp(partial(forward.hidden, rows=rows), (params,), (random_like(params),))
