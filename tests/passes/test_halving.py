"""Microbatches are halved where memory runs out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import collate
from funcprobe.passes.microbatches import over_microbatches
from funcprobe.policy.forward import Forward, frozen_forward
from funcprobe.policy.layout import microbatches
from support.architectures import make_policy
from support.policies import random_like
from support.rows import LAYOUTS, MASK_NR, equal_lengths, everything, groups, require_right

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
}


def limited(forward, most, error, read):
    """The same forward on a machine that holds activations of `most` tokens."""

    def hidden(params, rows):
        if rows.tokens > most:
            raise error()
        out = forward.hidden(params, rows)
        read.append(rows)
        return out

    bounds = []
    return forward._replace(hidden=hidden, halved=bounds.append), bounds


@pytest.mark.parametrize(
    ("error", "layout"),
    [("cuda", "plain"), ("cuda", "packed"), *((error, "shared") for error in ERRORS)],
)
def test_microbatches_are_halved_where_memory_runs_out(error, layout):
    model = make_policy()
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params, layout=layout)
    v = random_like(params)
    whole = everything(params, forward, v, 200, second=False)
    read = []
    small, bounds = limited(forward, 15, ERRORS[error], read)
    parts = everything(params, small, v, 200, second=False)
    for name, tensors in whole.items():
        for a, b in zip(tensors, parts[name], strict=True):
            assert float((a - b).norm()) <= 1e-10 * float(a.norm()), name
    # Each of the four passes found the bound by itself, and read each response token once.
    assert all(rows.tokens <= 15 for rows in read)
    pairs = [pair for rows in read for pair in zip(rows.sequence_T, rows.k_T, strict=True)]
    assert len(pairs) == 4 * int(MASK_NR.sum())
    first = bounds[: len(bounds) // 4]
    assert bounds == 4 * first
    assert first == sorted(set(first), reverse=True)
    assert all(12 <= bound < 200 for bound in bounds)  # 12: the longest sequence


def halving(batch, compute, max_tokens=200, layout="plain"):
    """(rows that were computed, bounds)."""
    bounds = []
    forward = Forward(None, None, torch.float64, None, layout, halved=bounds.append)

    def pairs(found, rows, out):
        return [*found, (rows, out)]

    done, parts = over_microbatches(compute, pairs, [], batch, max_tokens, forward)
    assert len(done) == len(parts)
    assert all(rows is part and out is rows for (rows, out), part in zip(done, parts, strict=True))
    return parts, bounds


@settings(max_examples=60)
@given(groups(), st.integers(0, 60), st.integers(0, 40), st.sampled_from(LAYOUTS))
def test_halving_on_any_batch(sequences, room, most, layout):
    batch = collate(*sequences)
    longest = int((batch.prompt_length_N + batch.response_length_N).max())
    most += longest

    def compute(rows):
        if rows.tokens > most:
            raise MemoryError
        return rows

    parts, bounds = halving(batch, compute, longest + room, layout)
    require_right(batch, parts)
    assert bool(bounds) == any(r.tokens > most for r in microbatches(batch, longest + room, layout))
    assert [longest + room, *bounds] == sorted({longest + room, *bounds}, reverse=True)


def test_what_is_done_is_not_done_again_and_nothing_later_is_larger():
    """Memory runs out once, in the third of four microbatches."""
    batch = equal_lengths(16, 5, 5, range(16))
    calls = []

    def compute(rows):
        calls.append(rows)
        if len(calls) == 3:
            raise MemoryError
        return rows

    parts, bounds = halving(batch, compute, 40)
    assert [len(rows.tokens_NL) for rows in calls] == [4, 4, 4, *[1] * 8]
    assert bounds == [18]  # half of 4 rows of 9 tokens
    require_right(batch, parts)


def test_a_sequence_that_does_not_fit_alone_raises():
    batch = equal_lengths(4, 5, 5, range(4))
    for make in ERRORS.values():
        calls = []

        def compute(rows, make=make, calls=calls):
            calls.append(len(rows.sequence_T.unique()))
            assert len(calls) < 9, "the same sequence again and again"
            raise make()

        with pytest.raises(type(make())):
            halving(batch, compute, 40)
        assert calls == [4, 1]


def test_other_errors_are_raised_at_once():
    batch, calls = equal_lengths(4, 5, 5, range(4)), []
    for error in (RuntimeError("the size of tensor a must match"), ValueError("can't allocate memory")):

        def compute(rows, error=error):
            calls.append(rows)
            raise error

        with pytest.raises(type(error), match=str(error)):
            halving(batch, compute, 40)
    assert len(calls) == 2


def test_halving_ends_where_a_later_sequence_is_longer_than_half():
    """Shared prompts are sorted by the prompt's length, so that a long response may come later."""
    prompts = [[7] * 12] * 8 + [[8] * 2] * 2
    responses = [[1] * 3] * 8 + [[2] * 38] * 2
    batch = collate(prompts, responses, [0] * 8 + [1] * 2)
    first = microbatches(batch, 42, "shared")[0]
    assert first.sequence_T.unique().tolist() == list(range(8))
    assert first.tokens == 12 + 8 * 2
    calls = []

    def compute(rows):
        calls.append(rows)
        assert len(calls) < 50, "the same microbatch again and again"
        # Short rows with many blocks may take more memory than long ones.
        if len(rows.sequence_T.unique()) > 4:
            raise MemoryError
        return rows

    parts, _ = halving(batch, compute, 42, "shared")
    require_right(batch, parts)
