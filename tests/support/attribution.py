"""A small policy's step with all that attribution splits: E, U, a state of Adam, rules, estimators."""

from typing import Any

import pytest
import torch

import funcprobe
from funcprobe import AdamGroup, AdamState, Entropy, Step, UpdateBatch, tree
from support.policies import random_batch, random_like

# Prompt 1 is drawn three times into E; lengths, group sizes and coefficients are all unequal.
E = random_batch([(0, 3, 5), (1, 4, 2), (1, 4, 7), (2, 2, 1), (3, 5, 4), (1, 4, 3)], seed=1)
LENGTHS_U = [(0, 2, 3), (0, 2, 6), (1, 5, 1), (4, 5, 4), (1, 5, 2), (2, 3, 5)]
PROMPTS_U = ((0, 1), (2, 4), (5,), (3,))  # rows of each prompt, by the prompt's index


def update_of(lengths: Any, seed: int = 2, entropy: bool = True) -> UpdateBatch:
    return update_on(random_batch(lengths, seed=seed), seed, entropy)


def update_on(batch: funcprobe.Batch, seed: int, entropy: bool = True) -> UpdateBatch:
    """Random coefficients of l, and of h; the divisors of a mean over tokens, and over sequences."""
    mask = funcprobe.response_mask(batch)
    draws = {n: torch.zeros(mask.shape, dtype=torch.float64) for n in ("c", "d")}
    c, d = (0.1 * t * mask for t in random_like(draws, seed).values())
    ones = torch.ones(len(mask)).double()
    fields = {"entropy_coef_NR": d, "entropy_normaliser_N": ones} if entropy else {}
    return UpdateBatch(batch, c, batch.response_length_N.double(), **fields)


U = update_of(LENGTHS_U)
PLAIN = Step("adamw")
CLIPPED = Step("adamw", max_grad_norm=0.05)
BOUNDED = Step("precondition", max_update=0.01)
STEPS = [PLAIN, CLIPPED, Step("precondition"), BOUNDED, Step("sgd")]
each_step = pytest.mark.parametrize(
    "step", STEPS, ids=lambda s: "-".join(str(x) for x in s if x is not None)
)
ENTROPIES = [
    Entropy(per, integrand, weights)
    for per in ("token", "sequence")
    for integrand in ("rao_blackwell", "sampled")
    for weights in ("per_decision", "sequence")
]


def adam_state(params: funcprobe.Params, steps: int = 9, size: float = 0.1) -> AdamState:
    """Two groups of unequal everything, at 0 steps without moments; `size` of the gradients so far."""
    names = list(params)
    groups = (
        AdamGroup(tuple(names[::2]), 2e-4, 0.8, 0.95, 1e-3, 0.3),
        AdamGroup(tuple(names[1::2]), 5e-4, 0.9, 0.99, 2e-3, 0.0),
    )
    if steps == 0:
        return funcprobe.fresh_adam_state(params, groups)
    nu = {n: (size * t).square() for n, t in random_like(params, 5).items()}
    m = tree.scale(0.3 * size, random_like(params, 4))
    return AdamState(m, nu, dict.fromkeys(names, steps), groups)


def attributed(probe: Any, update: UpdateBatch = U, E=E, state=None, **given: Any):
    """(passes, attribution), with the prediction's own settings."""
    params, step = probe.params, given.pop("step", PLAIN)
    state = adam_state(params) if state is None else state
    masks, unit_N = given.pop("masks", ()), given.pop("unit_N", None)
    passes = funcprobe.first_order_passes(
        params, E, update, state, probe.forward, step=step, masks=masks, **given
    )
    along_DX = funcprobe.marginal_tangents(params, passes, update, state, probe.forward, step=step)
    found = funcprobe.attribute(
        params, passes, along_DX, E, update, state, step=step, unit_N=unit_N, **given
    )
    return passes, found


def difference(f: Any, e: float) -> float:
    """Central differences of fourth order: an error of e^4, and of 1e-16 / e by rounding."""
    return (8 * (f(e) - f(-e)) - (f(2 * e) - f(-2 * e))) / (12 * e)


def no_model(*_: Any) -> None:
    raise AssertionError("a pass was made")
