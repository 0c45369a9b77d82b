"""A policy small enough to enumerate all its responses."""

import itertools
from typing import NamedTuple

import torch

import funcprobe
from funcprobe import TokenStats, tree
from support.policies import random_like, tiny_policy

VOCABULARY, EOS, LONGEST = 5, 0, 4
PROMPTS = ([1, 3], [4, 2, 2])
ETA = 0.05  # large enough that second order matters: measured changes must match beyond the slope


class World(NamedTuple):
    """Every response to both prompts, with statistics at theta, along v, and at theta + ETA v."""

    batch: funcprobe.Batch
    stats: TokenStats
    tangent: TokenStats
    moved: TokenStats
    probability: torch.Tensor  # of prompt and response, sums to 1
    exact: dict  # per -> (H, dH along v, H(theta + ETA v) - H)


def every_response():
    for length in range(1, LONGEST + 1):
        for body in itertools.product(range(1, VOCABULARY), repeat=length - 1):
            ends = range(VOCABULARY) if length == LONGEST else [EOS]
            yield from ([*body, end] for end in ends)


def exact_entropy(logp: torch.Tensor, length: torch.Tensor, per: str) -> torch.Tensor:
    """-sum p log p of whole responses (over two prompts of equal weight), by expected length."""
    p = logp.exp() / len(PROMPTS)
    per_sequence = -(p * logp).sum()
    return per_sequence / (p * length).sum() if per == "token" else per_sequence


def make_world() -> World:
    probe = funcprobe.bind(tiny_policy(VOCABULARY), max_tokens=4096)
    responses = list(every_response())
    assert len(responses) == 341
    batch = funcprobe.collate(
        [x for x in PROMPTS for _ in responses],
        [y for _ in PROMPTS for y in responses],
        [i for i in range(len(PROMPTS)) for _ in responses],
    )
    v = tree.scale(0.1, random_like(probe.params))
    stats, tangent = probe.tangents(probe.params, batch, v)
    moved = probe.token_stats(tree.axpy(ETA, v, probe.params), batch)
    logp, length = stats.logp_NR.sum(1), batch.response_length_N.double()
    # The exact derivative by autograd in reverse mode: nothing shared with tangents.
    leaves = {n: t.clone().requires_grad_() for n, t in probe.params.items()}
    exact = {}
    for per in ("token", "sequence"):
        value = exact_entropy(probe.seq_logprobs(leaves, batch), length, per)
        grads = torch.autograd.grad(value, list(leaves.values()))
        slope = tree.dot(dict(zip(leaves, grads, strict=True)), v)
        change = exact_entropy(moved.logp_NR.sum(1), length, per) - value
        exact[per] = (float(value.detach()), slope, float(change.detach()))
    return World(batch, stats, tangent, moved, logp.exp() / len(PROMPTS), exact)


def population(world: World) -> torch.Tensor:
    """Indices that hold every response as often as a uniform sampler of tokens draws it."""
    copies = VOCABULARY ** (LONGEST - world.batch.response_length_N)
    return torch.repeat_interleave(torch.arange(len(copies)), copies)
