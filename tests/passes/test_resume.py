"""Passes that end after any microbatch and go on from what was kept: undisturbed ones, to the bit."""

import itertools
from typing import Any

import pytest
import torch

import funcprobe
from funcprobe.passes.block_gradients import block_gradients
from funcprobe.policy.forward import frozen_forward
from funcprobe.policy.reference import base_params
from funcprobe.progress import SoFar
from support.architectures import BATCH, P_NR, Q_NR, make_policy
from support.in_turn import in_turn
from support.kept import InMemory, KilledError
from support.policies import random_like

MOST = 14  # tokens of a microbatch: four of BATCH's, or fewer


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = [value[n] for n in sorted(value)] if isinstance(value, dict) else list(value)
    return [leaf for one in values for leaf in leaves(one)]


def passes(model, layout="plain"):
    """Every pass, as a function of the forward and the most tokens of a microbatch."""
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params, layout=layout)
    v = random_like(params)
    both = {"p_NR": P_NR, "q_NR": Q_NR}
    block_N = torch.arange(len(BATCH.prompt_N)) % 2
    base = base_params(model, params) if hasattr(model, "peft_config") else random_like(params)
    return forward, {
        "token_stats": lambda f, m=MOST: funcprobe.token_stats(params, BATCH, f, m),
        "tangents": lambda f, m=MOST: funcprobe.tangents(params, BATCH, v, f, m),
        "second_tangents": lambda f, m=MOST: funcprobe.second_tangents(params, BATCH, v, f, m),
        "weighted_grad": lambda f, m=MOST: funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, f, m),
        "blocks": lambda f, m=MOST: block_gradients(
            params, BATCH, P_NR, Q_NR, block_N, [v, random_like(params, 1)], f, m
        ),
        "grad_dots": lambda f, m=MOST: funcprobe.grad_dots(params, BATCH, v, f, m, **both),
        "alpha_vjp": lambda f, m=MOST: funcprobe.alpha_vjp(params, BATCH, v, f, m, **both),
        "kl_along": lambda f, m=MOST: funcprobe.kl_along(params, base, BATCH, v, f, (1e-3,), m),
    }


NAMES = tuple(passes(make_policy())[1])


def require_resumable(program, forward, again=None, least=2):
    """Ended after each of its microbatches in turn, and once more after each of those that are left.

    `again`: the forward of the process that goes on, by default the same.
    """
    whole = InMemory()
    expected = leaves(program(forward._replace(progress=whole)))
    plain = leaves(program(forward))
    assert all(torch.equal(a, b) for a, b in zip(expected, plain, strict=True))
    assert whole.kept >= least
    for done in range(1, whole.kept + 1):
        first = InMemory(done)
        with pytest.raises(KilledError):
            program(forward._replace(progress=first))
        twice = done + 1 < whole.kept
        if twice:
            first = InMemory(1, first)
            with pytest.raises(KilledError):
                program((again or forward)._replace(progress=first))
        last = InMemory(None, first)
        found = leaves(program((again or forward)._replace(progress=last)))
        assert last.kept == whole.kept - done - twice  # each microbatch once
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_pass(name):
    forward, programs = passes(make_policy())
    require_resumable(programs[name], forward)


@pytest.mark.parametrize("name", NAMES)
def test_what_no_such_pass_makes_does_not_fit(name):
    forward, programs = passes(make_policy())
    whole = InMemory()
    programs[name](forward._replace(progress=whole))
    assert whole.stored
    for number, (_, (counts, tensors)) in whole.stored.items():
        others = [
            *((x, tensors) for x in ((), (*counts[:-1], 99), (*counts, 98), (99, 1, 1))),
            *((counts, x) for x in ([], tensors[:-1], [*tensors, tensors[-1]])),
            (counts, [torch.cat([x, x]) for x in tensors]),
            (counts, [x[None] for x in tensors]),
            *((counts, [x.to(d) for x in tensors]) for d in (torch.float16, torch.int64)),
        ]
        fits = whole.fits[number]
        assert fits(SoFar(counts, tensors))
        assert [i for i, x in enumerate(others) if fits(SoFar(*x))] == []


@pytest.mark.parametrize("name", ["tangents", "blocks"])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_packed_rows(name, layout):
    forward, programs = passes(make_policy(), layout)
    require_resumable(programs[name], forward)


@pytest.mark.parametrize("name", ["blocks", "weighted_grad", "grad_dots", "token_stats"])
def test_ranks_that_kept_differently_much(name):
    """Each writes in its own time: one may have begun another block when all are killed, or none."""
    forward, programs = passes(make_policy())
    history: list[list[InMemory]] = [[], []]

    def program(ranks, before=(None, None)):
        own = InMemory(None, before[ranks.rank])
        history[ranks.rank] = own.history
        return leaves(
            programs[name](forward._replace(ranks=ranks, progress=own), 8)
        )  # the longest sequence

    expected, _ = in_turn(2, program)
    kept = [[None, *one] for one in history]
    assert min(map(len, kept)) > 2
    for before in itertools.product(*kept):
        for found in in_turn(2, lambda ranks, before=before: program(ranks, before)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_contractions_that_take_two_passes():
    """Norms are no linear layers, which the first microbatch finds."""
    forward, programs = passes(make_policy("qwen2", "trained-norms"))
    require_resumable(programs["grad_dots"], forward, least=4)


@pytest.mark.parametrize("name", ["weighted_grad", "blocks", "grad_dots", "alpha_vjp"])
def test_layers_that_are_computed_again(name):
    forward, programs = passes(make_policy())
    require_resumable(programs[name], forward._replace(recompute=True))


def scarce(forward, room):
    """The forward where memory runs out over the tokens of `room`, call by call; its calls."""
    calls = []

    def hidden(params, rows):
        calls.append(rows)
        if rows.tokens > room[min(len(calls), len(room)) - 1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward.hidden(params, rows)

    return forward._replace(hidden=hidden), calls


@pytest.mark.parametrize("name", ["tangents", "weighted_grad", "blocks"])
@pytest.mark.parametrize("room", [(13,), (99, 11), (11, 99)])
def test_memory_that_ran_out_before_or_after(name, room):
    """The process that goes on has all memory, or runs out of it where the first one would have."""
    forward, programs = passes(make_policy())

    def program(f):
        return programs[name](f, 16)

    whole = InMemory()
    expected = leaves(program(scarce(forward, room)[0]._replace(progress=whole)))
    assert whole.kept >= 3
    halved = []
    for done in range(1, whole.kept):
        first = InMemory(done)
        tight, calls = scarce(forward, room)
        with pytest.raises(KilledError):
            program(tight._replace(progress=first))
        last = InMemory(None, first)
        again, _ = scarce(forward, room[len(calls) :] or room[-1:])
        found = leaves(program(again._replace(progress=last, halved=halved.append)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), done
        assert last.kept == whole.kept - done
    assert halved


@pytest.mark.parametrize("name", ["weighted_grad", "grad_dots", "alpha_vjp"])
def test_a_single_sequence_that_did_not_fit(name, monkeypatch):
    """The process that goes on has memory enough, and recomputes layers as the first one did."""
    forward, programs = passes(make_policy())
    for module in ("gradients", "grad_dots"):
        monkeypatch.setattr(f"funcprobe.passes.{module}.unlayered", lambda *_: None)

    def hidden(given, rows):
        stack = torch.overrides._get_current_function_mode_stack()
        small = any(type(m).__name__ in {"LayerByLayer", "ForwardMode"} for m in stack)
        if not small and rows.tokens > 6 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward.hidden(given, rows)

    said = []
    roomy = forward._replace(recomputing=lambda: said.append(1))
    require_resumable(programs[name], forward._replace(hidden=hidden), roomy)
    assert said


def test_first_order_as_a_whole():
    model = make_policy()
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params)
    update = funcprobe.update_batch(BATCH, torch.tensor([1.0, -0.5, 0.25, -0.75]), "token_mean")
    groups = (funcprobe.AdamGroup(tuple(params), 1e-3, 0.9, 0.99, 1e-8, 0.0),)
    state = funcprobe.fresh_adam_state(params, groups)
    block_N = torch.arange(4) % 2

    def program(f):
        found = funcprobe.first_order_passes(
            params, BATCH, update, state, f, max_tokens=MOST, block_N=block_N
        )
        return [x for x in found if x is not None]

    require_resumable(program, forward, least=8)
