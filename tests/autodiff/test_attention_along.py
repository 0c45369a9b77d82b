"""Attention along a direction by blocks: dense formulas as oracle, what is computed, what is held."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from funcprobe.autodiff import attention_along as module
from funcprobe.autodiff.attention_along import attention_along, attention_twice_along
from funcprobe.autodiff.taylor import second_jvp


@contextmanager
def blocks(scores, product_rows):
    """Blocks of `scores` bytes and `product_rows` queries at most."""
    with patch.dict(module.SCORES, cpu=scores), patch.object(module, "PRODUCT_ROWS", product_rows):
        yield


def allowed(mask, is_causal, shape):
    """(pairs that attend, what is added to their scores), dense."""
    seen = torch.ones(shape, dtype=torch.bool)
    if is_causal:
        return seen.tril(), torch.zeros(shape, dtype=torch.float64)
    if mask is None or mask.dtype == torch.bool:
        return seen if mask is None else seen & mask, torch.zeros(shape, dtype=torch.float64)
    added = mask.expand(shape)
    return added != -torch.inf, added.masked_fill(added == -torch.inf, 0)


def dense(query, key, value, mask, is_causal, scale):
    """exp(S) / sum over what is seen, 0 where nothing is; every head with keys of its own."""
    each = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    scores = torch.einsum("nhqd,nhkd->nhqk", query, key) * scale
    seen, added = allowed(mask, is_causal, scores.shape)
    weight = torch.exp(scores + added) * seen
    total = weight.sum(-1, keepdim=True)
    return torch.einsum("nhqk,nhkd->nhqd", weight / torch.where(total > 0, total, 1), value)


class Case(NamedTuple):
    query: list
    key: list
    value: list
    mask: torch.Tensor | None
    is_causal: bool


@st.composite
def cases(draw):
    """Values and two derivatives of query, key, value; masks of every kind, some of whole rows."""
    n, heads, each, count = (draw(st.integers(1, most)) for most in (3, 3, 3, 9))
    keys = draw(st.one_of(st.just(count), st.integers(1, 9)))
    width, depth = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def three(*shape):
        return [normal(*shape) for _ in range(3)]

    kind = draw(st.sampled_from(["none", "causal", "window", "boolean", "-inf", "additive"]))
    mask = None
    if kind == "window":
        at = torch.arange(count)[:, None] - torch.arange(keys)
        mask = (at >= 0) & (at < draw(st.integers(1, 4)))
    elif kind in {"boolean", "-inf", "additive"}:
        leading = draw(st.sampled_from([(), (1, 1), (n, 1), (n, heads * each), (heads * each,)]))
        mask = normal(*leading, draw(st.sampled_from([1, count])), keys)
        if kind != "additive":
            # Some queries see nothing, and some keys nobody.
            hidden = (mask > 0.3) | (torch.rand(keys, generator=generator) < 0.3)
            hidden = hidden | (torch.rand(*mask.shape[:-1], 1, generator=generator) < 0.2)
            mask = ~hidden if kind == "boolean" else mask.masked_fill(hidden, -torch.inf)
    query = three(n, heads * each, count, width)
    return Case(
        query, three(n, heads, keys, width), three(n, heads, keys, depth), mask, kind == "causal"
    )


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm()) <= 1e-12 * max(1.0, float(theirs.norm()))


@settings(max_examples=120, deadline=None)
@given(
    cases(),
    st.sampled_from([1, 100, 600, 2**22]),
    st.sampled_from([1, 2, 7, 256]),
    st.sampled_from([None, 0.7]),
)
def test_blocks_of_any_size_give_the_dense_derivatives(case, scores, product_rows, scale):
    query, key, value, mask, is_causal = case
    factor = query[0].shape[-1] ** -0.5 if scale is None else scale

    def f(*at):
        return dense(*at, mask, is_causal, factor)

    def first(at, along):
        return jvp(f, at, along)[1]

    at, along, bend = zip(query, key, value, strict=True)
    out, slope = jvp(f, at, along)
    _, curvature = jvp(first, (at, along), (along, bend))
    with blocks(scores, product_rows):
        close(attention_along((*at, out), along, mask, is_causal, scale), slope)
        found = attention_twice_along(query, key, value, mask, is_causal, scale)
    for ours, theirs in zip(found, (out, slope, curvature), strict=True):
        close(ours, theirs)
    # The oracle is torch's attention where every query sees a key, and where one sees none.
    each = query[0].shape[1] // key[0].shape[1]
    theirs = scaled_dot_product_attention(
        *at, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=each > 1
    )
    close(out, theirs)


class Recorded(TorchDispatchMode):
    """Pairs of queries and keys that have a score computed, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.pairs, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "softmax" in func.name():
            self.pairs += out.numel()
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


HEADS, EACH, LENGTH, WIDTH, SIZE, WINDOW = 2, 3, 96, 4, 8, 10


def recorded(call):
    with Recorded() as record:
        call()
    return record


def inputs(count):
    shapes = [(1, HEADS * EACH, LENGTH, WIDTH)] + 2 * [(1, HEADS, LENGTH, WIDTH)]
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(s, generator=generator) for _ in range(count)] for s in shapes]


def sliding():
    at = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return (at >= 0) & (at < WINDOW)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", ["causal", "window", "whole"])
def test_no_score_is_computed_of_keys_that_no_query_of_a_block_sees(kind, second):
    """And no tensor is larger than a block's scores, whose bound is far below all of them."""
    query, key, value = inputs(3)
    room = 4 * EACH * SIZE * LENGTH  # bytes: one head of keys
    mask, is_causal = sliding() if kind == "window" else None, kind == "causal"
    out = torch.zeros(1, HEADS * EACH, LENGTH, WIDTH)

    def call():
        if second:
            return attention_twice_along(query, key, value, mask, is_causal, None)
        at = (query[0], key[0], value[0], out)
        along = (query[1], key[1], value[1])
        return attention_along(at, along, mask, is_causal, None)

    with blocks(room, EACH * SIZE):
        record = recorded(call)
    of_blocks = range(0, LENGTH, SIZE)
    pairs = {
        "causal": sum(SIZE * (start + SIZE) for start in of_blocks),
        "window": sum(SIZE * (start + SIZE - max(0, start - WINDOW + 1)) for start in of_blocks),
        "whole": LENGTH**2,
    }[kind]
    assert record.pairs == HEADS * EACH * pairs
    assert pairs <= LENGTH * {"causal": (LENGTH + SIZE) // 2, "window": WINDOW + SIZE}.get(kind, LENGTH)
    # Beside scores there are queries and keys with their derivatives, and the mask's own size.
    beside = 4 * HEADS * EACH * LENGTH * WIDTH * 3
    assert room <= record.largest <= max(room, beside)
    assert record.largest <= 4 * HEADS * EACH * LENGTH**2 / 8


def test_a_longer_sequence_has_no_larger_blocks():
    with blocks(2**10, 256):
        for length in (32, 64, 128):
            x = torch.zeros(1, 2, length, 1)
            record = recorded(lambda x=x: attention_along((x, x, x, x), (x, x, x), None, True, None))
            assert record.largest == max(2**10, 4 * 2 * length * 2)  # of the keys and their tangents


def test_a_transform_around_the_second_derivative_is_followed():
    """The rule writes into tensors of its own, so that torch's attention is differentiated instead."""
    at, along, _ = zip(*inputs(3), strict=True)
    at, along = ([x[:, :, :5].double() for x in part] for part in (at, along))
    at[1:], along[1:] = ([x.repeat_interleave(EACH, 1) for x in part[1:]] for part in (at, along))

    def attend(*x):
        return scaled_dot_product_attention(*x, is_causal=True)

    def ours(query):
        return second_jvp(attend, (query, *at[1:]), tuple(along))[2].square().sum()

    def theirs(query):
        def first(*x):
            return jvp(attend, x, tuple(along))[1]

        return jvp(first, (query, *at[1:]), tuple(along))[1].square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(grad(ours)(at[0]), grad(theirs)(at[0]), rtol=1e-10, atol=1e-12)
