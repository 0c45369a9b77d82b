"""Passes that several processes share give what one gives, on every rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import InputError, collate
from funcprobe.passes.block_gradients import block_gradients
from funcprobe.passes.microbatches import over_microbatches
from funcprobe.policy.dropout import masked_forwards
from funcprobe.policy.forward import Forward, frozen_forward
from funcprobe.ranks import ALONE, Ranks, most_loaded, shares
from support.architectures import make_policy
from support.builders import gpt2
from support.in_turn import in_turn
from support.policies import random_batch, random_like, tiny_policy
from support.rows import BATCH, LAYOUTS, P_NR, Q_NR, groups, require_right

LONGEST = 12  # of the sequences in BATCH


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = [value[n] for n in sorted(value)] if isinstance(value, dict) else list(value)
    return [leaf for one in values for leaf in leaves(one)]


def require_same(size, program):
    """On every rank within 1e-12 of one process, and bit-identical on all of them."""
    alone = leaves(program(ALONE))
    first, *others = in_turn(size, lambda ranks: leaves(program(ranks)))
    assert len(others) == size - 1
    for a, b in zip(alone, first, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(a.abs().max()))
    for found in others:
        assert all(torch.equal(b, x) for b, x in zip(first, found, strict=True))


def primitives(params, forward, v, max_tokens):
    """Programs of one pass each, so that few sums are waited for."""
    both = {"p_NR": P_NR, "q_NR": Q_NR}

    def of(f, *given, **named):
        def program(ranks):
            return f(params, BATCH, *given, forward._replace(ranks=ranks), max_tokens, **named)

        return program

    return {
        "token_stats": of(funcprobe.token_stats),
        "tangents": of(funcprobe.tangents, v),
        "weighted_grad": of(funcprobe.weighted_grad, P_NR, Q_NR),
        "alpha_vjp": of(funcprobe.alpha_vjp, v, **both),
        "second_tangents": of(funcprobe.second_tangents, v),
        "grad_dots": of(funcprobe.grad_dots, v, **both),
    }


@pytest.mark.parametrize(
    ("size", "layout", "max_tokens"),
    [(2, "plain", LONGEST), (3, "packed", 30), (4, "shared", 2048)],
)
def test_every_primitive(size, layout, max_tokens):
    model = make_policy()
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params, layout=layout)
    for program in primitives(params, forward, random_like(params), max_tokens).values():
        require_same(size, program)


def test_blocks_and_divergences_and_what_is_not_linear():
    """At more ranks than some blocks have sequences; GPT-2's dots come from a second pass."""
    model = gpt2(torch.float64)
    params = funcprobe.trainable_params(model)
    forward, v = frozen_forward(model, params), random_like(params)
    E = random_batch([(0, 2, 3), (1, 3, 2), (2, 2, 4), (3, 1, 1)])
    p_NR = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block_N = torch.tensor([0, 1, 0, 1])
    base = {n: torch.zeros_like(t) for n, t in params.items()}

    def blocks(ranks):
        given = (block_N, [v, base], forward._replace(ranks=ranks), 16)
        X, found = block_gradients(params, E, p_NR, p_NR, *given)
        return X, found.dot_KTd

    def kl(ranks):
        return funcprobe.kl_along(params, base, E, v, forward._replace(ranks=ranks), (1e-2,), 16)

    def dots(ranks):
        return funcprobe.grad_dots(params, E, v, forward._replace(ranks=ranks), 16)

    for program in (blocks, kl, dots):
        require_same(3, program)


def test_masks_of_dropout_are_of_sequences():
    model = tiny_policy()
    for name, layer in model.named_modules():
        if name.endswith("lora_dropout"):
            layer["default"] = torch.nn.Dropout(0.3).eval()
    params = funcprobe.trainable_params(model)
    mask, _ = masked_forwards(model, params, frozen_forward(model, params), 2, seed=1)
    batch = random_batch([(0, 2, 3), (1, 3, 2), (2, 2, 4), (1, 3, 5)])
    p_NR = funcprobe.response_mask(batch).double()

    def program(ranks):
        shared = mask._replace(ranks=ranks)
        return funcprobe.weighted_grad(params, batch, p_NR, p_NR, shared, 20)

    require_same(3, program)


def own_microbatches(batch, max_tokens, forward):
    return over_microbatches(lambda _: (), lambda *_: [], [], batch, max_tokens, forward)[1]


@settings(max_examples=60)
@given(groups(), st.integers(1, 6), st.integers(0, 60), st.sampled_from(LAYOUTS))
def test_any_batch_is_shared_out_whole_and_in_balance(sequences, size, room, layout):
    batch = collate(*sequences)
    length_N = batch.prompt_length_N + batch.response_length_N
    longest, count = int(length_N.max()), len(length_N)
    by_rank = []
    for rank in range(size):
        forward = Forward(None, None, torch.float64, None, layout, ranks=Ranks(rank, size, list))
        by_rank.append(own_microbatches(batch, longest + room, forward))
    require_right(batch, [rows for own in by_rank for rows in own])
    loads = [sum(rows.tokens for rows in own) for own in by_rank]
    assert all(rows.tokens <= longest + room for own in by_rank for rows in own)
    # Greedy, longest first: no rank has more than a share and one microbatch.
    largest = max(rows.tokens for own in by_rank for rows in own)
    assert max(loads) <= sum(loads) / size + largest
    assert size == 1 or max(loads) < sum(loads) or count == 1 or layout == "shared"


def test_batches_that_are_no_multiple_of_the_size_are_balanced():
    """Ten sequences of 300 tokens on four ranks: three at most, though two microbatches hold all."""
    batch = random_batch([(i, 100, 200) for i in range(10)])
    for size, most in ((2, 5), (3, 4), (4, 3), (5, 2), (10, 1), (12, 1)):
        counts = []
        for rank in range(size):
            forward = Forward(None, None, torch.float64, None, "plain", ranks=Ranks(rank, size, list))
            own = own_microbatches(batch, 2048, forward)
            counts.append(sum(len(rows.sequence_T.unique()) for rows in own))
        assert sum(counts) == 10
        assert max(counts) == most


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_shares_are_by_a_loop_over_the_longest(tokens, size):
    found = shares(tokens, size)
    load = [0] * size
    for count, i in sorted(((count, i) for i, count in enumerate(tokens)), key=lambda x: (-x[0], x[1])):
        rank = min(range(size), key=lambda r: (load[r], r))
        load[rank] += count
        assert i in found[rank]
    assert sorted(i for own in found for i in own) == list(range(len(tokens)))
    assert all(own == sorted(own) for own in found)
    assert most_loaded(tokens, size) == max(load)


@pytest.mark.parametrize("lost", [0, 1])
def test_memory_that_runs_out_on_one_rank_is_its_own_affair(lost):
    model = make_policy()
    params = funcprobe.trainable_params(model)
    forward, halved = frozen_forward(model, params, layout="packed"), []

    def program(ranks):
        def hidden(given, rows):
            if ranks.rank == lost and ranks.size > 1 and rows.tokens > LONGEST:
                raise MemoryError
            return forward.hidden(given, rows)

        of_rank = forward._replace(
            hidden=hidden, ranks=ranks, halved=lambda n: halved.append((ranks.rank, n))
        )
        return funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, of_rank)

    require_same(2, program)
    assert {rank for rank, _ in halved} == {lost}


def test_one_sequence_on_four_ranks():
    """Three of them have nothing to compute, and know all the results."""
    model = tiny_policy()
    params = funcprobe.trainable_params(model)
    forward, v = frozen_forward(model, params), random_like(params)
    batch = random_batch([(0, 3, 4)])

    for f in (funcprobe.tangents, funcprobe.grad_dots):
        require_same(4, lambda ranks, f=f: f(params, batch, v, forward._replace(ranks=ranks)))


def test_a_derivative_across_processes_is_refused():
    model = tiny_policy()
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params)._replace(ranks=Ranks(0, 2, list))
    batch = random_batch([(0, 3, 4), (1, 2, 2)])

    def total(given):
        return funcprobe.seq_logprobs(given, batch, forward).sum()

    with pytest.raises(InputError, match=r"sums over 2 processes.*use one process"):
        torch.func.grad(total)(params)
    leaf = {n: t.clone().requires_grad_() for n, t in params.items()}
    with pytest.raises(InputError, match="sums over 2 processes"):
        total(leaf)
    with torch.no_grad():
        total(leaf)
