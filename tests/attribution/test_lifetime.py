"""What a gradient does through momentum in later steps, against steps of AdamW with frozen scales."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprobe
from funcprobe import AdamGroup, AdamState, Step, tree
from support.policies import random_like

PLAIN = Step()
SHAPES = {"a": (3, 5), "b": (4,), "c": (2, 2)}
LIKE = {n: torch.zeros(shape).double() for n, shape in SHAPES.items()}


def state(beta1: float, other: float | None = None, steps: int = 4) -> AdamState:
    """Two groups, the second with another beta1 if given."""
    groups = (
        AdamGroup(("a", "b"), 1e-3, beta1, 0.99, 1e-3, 0.1),
        AdamGroup(("c",), 2e-3, beta1 if other is None else other, 0.9, 1e-2, 0.0),
    )
    nu = {n: t.square() for n, t in random_like(LIKE, 5).items()}
    return AdamState(random_like(LIKE, 4), nu, dict.fromkeys(LIKE, steps), groups)


def shares(adam: AdamState, X, Y, step: Step = PLAIN) -> dict[str, float]:
    found = funcprobe.module_shares(X, LIKE, (Y,), adam, step)
    return {name: part.update for name, part in found.tensor.items()}


def stepped(adam: AdamState, X, Y, count: int) -> list[float]:
    """<X, v> of this step and of `count` after it that the gradient Y makes, less those without Y.

    Adam's recursion step by step; its denominator stays that of the first step, and later gradients
    are 0.
    """
    group_of = {n: g for g in adam.groups for n in g.names}
    lr = adam.groups[0].lr
    each = [0.0] * (count + 1)
    for n, g in group_of.items():
        t = adam.step[n] + 1
        nu = (g.beta2 * adam.exp_avg_sq[n] + (1 - g.beta2) * Y[n] ** 2) / (1 - g.beta2**t)
        for sign, first in ((1, -Y[n]), (-1, 0 * Y[n])):
            m, gradient = adam.exp_avg[n].clone(), first
            for j in range(count + 1):
                m = g.beta1 * m + (1 - g.beta1) * gradient
                v = -g.lr / lr * m / (1 - g.beta1 ** (t + j)) / (nu.sqrt() + g.eps)
                each[j] += sign * float((X[n] * v).sum())
                gradient = 0 * Y[n]
    return each


@pytest.mark.parametrize(
    ("beta1", "other", "steps"), [(0.9, None, 4), (0.8, 0.95, 1), (0.5, 0.9, 300), (0.9, 0.0, 0)]
)
def test_later_is_the_sum_over_many_steps(beta1, other, steps):
    X, Y = random_like(LIKE, 1), random_like(LIKE, 2)
    adam = state(beta1, other, steps)
    found = funcprobe.lifetime(shares(adam, X, Y), adam)
    now, *later = stepped(adam, X, Y, 800)  # 0.95^800 is 1e-18
    assert found.now == pytest.approx(now, rel=1e-9)
    assert found.later == pytest.approx(sum(later), rel=1e-9)
    assert found.total == found.now + found.later
    assert (found.factor is None) == (other is not None)


@given(beta1=st.floats(0.01, 0.99), steps=st.integers(0, 5000))
def test_factor_is_the_series(beta1, steps):
    """Term by term to where beta1^j is under 1e-20, which at 0.99 takes 4,600 terms."""
    t, total, power = steps + 1, 0.0, 1.0
    for j in range(1, 5000):
        power *= beta1
        total += power / (1 - beta1 ** (t + j))
    adam = state(beta1, steps=steps)
    found = funcprobe.lifetime({"a": 1.0, "b": -0.5, "c": 0.25}, adam)
    assert found.factor == pytest.approx((1 - beta1**t) * total, rel=1e-10)
    assert found.later == pytest.approx(found.factor * 0.75, rel=1e-12)
    assert found.factor <= beta1 / (1 - beta1) * (1 + 1e-12)
    if beta1**steps < 1e-12:
        assert found.factor == pytest.approx(beta1 / (1 - beta1), rel=1e-10)


def test_without_momentum_nothing_comes_later():
    X, Y = random_like(LIKE, 1), random_like(LIKE, 2)
    for step in (Step("sgd"), Step("precondition")):
        found = funcprobe.lifetime(shares(state(0.9), X, Y, step), state(0.9), step)
        assert (found.later, found.factor) == (0.0, 0.0)
        assert found.now != 0
    assert funcprobe.later_factors(state(0.9), Step("sgd")) == dict.fromkeys(LIKE, 0.0)
    found = funcprobe.lifetime(shares(state(0.0), X, Y), state(0.0))
    assert (found.later, found.factor) == (0.0, 0.0)
    assert tree.dot(X, Y) != 0
