"""The derivative of the step in its gradient, against finite differences of <X, v(Y + e Z)>."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import AdamGroup, AdamState, InputError, Params, Step, tree
from funcprobe.step.masked import mean_direction, mean_response

SHAPES = {"a.lora_A": (3, 5), "a.lora_B": (4, 3), "b.lora_A": (2, 7), "bias": (4,)}
# Groups of unequal everything: one's beta, eps or learning rate used for the other shows.
GROUPS = (
    AdamGroup(("b.lora_A", "a.lora_A"), 2e-4, 0.8, 0.95, 1e-2, 0.3),
    AdamGroup(("bias", "a.lora_B"), 5e-4, 0.9, 0.99, 3e-2, 0.0),
)
STEPS = [
    Step("adamw"),
    Step("adamw", max_grad_norm=0.5),
    Step("adamw", max_grad_norm=1e6),
    Step("precondition"),
    Step("precondition", max_update=0.7),
    Step("sgd"),
]


def draw(seed: int, size: float = 1.0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: size * torch.randn(shape, generator=generator, dtype=torch.float64)
        for n, shape in SHAPES.items()
    }


def state_after(steps: int) -> AdamState:
    """At 0 the moments are 0: v is then almost Y / |Y|, of which only eps leaves a derivative."""
    if steps == 0:
        return funcprobe.fresh_adam_state(draw(0), GROUPS)
    nu = {n: t.square() for n, t in draw(2).items()}
    return AdamState(draw(1, 0.3), nu, dict.fromkeys(SHAPES, steps), GROUPS)


def prediction(X: Params, Y: Params, state: AdamState, step: Step) -> float:
    v = funcprobe.update_direction(draw(3), Y, state, **step._asdict())
    return tree.dot(X, v.total)


def slope(f: Any, e: float) -> float:
    """Central differences of fourth order: an error of e^4, and of 1e-16 / e by rounding."""
    return (8 * (f(e) - f(-e)) - (f(2 * e) - f(-2 * e))) / (12 * e)


@pytest.mark.parametrize("steps", [0, 8, 999])
@pytest.mark.parametrize("step", STEPS, ids=lambda s: "-".join(str(x) for x in s if x is not None))
def test_response_is_the_derivative_of_the_prediction(step, steps):
    X, Y, Z, state = draw(4), draw(5), draw(6), state_after(steps)
    found = funcprobe.response(draw(3), X, Y, state, **step._asdict())
    expected = slope(lambda e: prediction(X, tree.axpy(e, Z, Y), state, step), 1e-5)
    # Rounding of the differences is 1e-11 of <X, v>, which is of the derivative's size or, at step 1,
    # a hundred times that.
    assert tree.dot(found, Z) == pytest.approx(expected, rel=1e-8)
    clip = funcprobe.update_direction(draw(3), Y, state, **step._asdict()).clip_coefficient
    assert (clip < 1) == (step.max_grad_norm == 0.5)
    held = tree.multiply(funcprobe.update_direction(draw(3), Y, state, **step._asdict()).scale, X)
    differs = abs(tree.dot(held, Z) / expected - 1) > 1e-3
    assert differs == (step.rule == "adamw" or step.max_update is not None)


def test_some_entries_are_bounded_and_some_are_not():
    """Else the bound's derivative would go untested above."""
    scale = funcprobe.precondition(draw(5), state_after(8))
    bounded = sum(int((t.abs() > 0.7).sum()) for t in scale.values())
    assert 5 < bounded < 35


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    steps=st.sampled_from([1, 8, 999]),
    clip=st.sampled_from([None, 0.2, 3.0, 50.0]),
    size=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_response_is_linear_and_transposed(seed, steps, clip, size):
    """Against the dense D, a column for every entry, from autograd of v written anew."""
    state, Y, X = state_after(steps), draw(seed, size), draw(seed + 1)
    found = funcprobe.response(draw(3), X, Y, state, max_grad_norm=clip)
    leaves = {n: t.clone().requires_grad_() for n, t in Y.items()}
    norm = torch.cat([t.flatten() for t in leaves.values()]).norm()
    factor = 1.0 if clip is None else torch.clamp(clip / (norm + 1e-6), max=1.0)
    value = torch.zeros((), dtype=torch.float64)
    for group in GROUPS:
        for n in group.names:
            g, k = -factor * leaves[n], steps + 1
            m = group.beta1 * state.exp_avg[n] + (1 - group.beta1) * g
            nu = group.beta2 * state.exp_avg_sq[n] + (1 - group.beta2) * g**2
            taken = m / (1 - group.beta1**k) / ((nu / (1 - group.beta2**k)) ** 0.5 + group.eps)
            value = value - group.lr / GROUPS[0].lr * (X[n] * taken).sum()
    expected = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    for n in SHAPES:
        # Some tens of roundings of entries that are at most the largest one.
        torch.testing.assert_close(found[n], expected[n], rtol=1e-9, atol=1e-13 * tree.norm(expected))


def test_a_clipped_step_without_memory_does_not_answer_to_its_size():
    """Y (1 + e) is clipped to the same g, but for the 1e-6 that is added to the norm."""
    X, Y, state, step = draw(4), draw(5), state_after(8), {"max_grad_norm": 0.5}
    found = tree.dot(funcprobe.response(draw(3), X, Y, state, **step), Y)
    held = tree.dot(tree.multiply(funcprobe.update_direction(draw(3), Y, state, **step).scale, X), Y)
    assert abs(found) < 1e-6 * abs(held)
    free = tree.dot(funcprobe.response(draw(3), X, Y, state), Y)
    assert abs(free) > 1e-2 * abs(held)


def test_a_second_moment_of_zero_gives_the_mean_of_both_sides():
    """exp_avg_sq of float32 may be 0 where exp_avg is not: v then has a kink in Y, at 0."""
    zero = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in SHAPES.items()}
    state = AdamState(draw(1), zero, dict.fromkeys(SHAPES, 8), GROUPS)
    Y = draw(5) | {"bias": zero["bias"]}
    X, Z = draw(4), zero | {"bias": draw(6)["bias"]}
    found = tree.dot(funcprobe.response(draw(3), X, Y, state), Z)

    def one_sided(e: float) -> float:
        here = prediction(X, Y, state, Step())
        return (prediction(X, tree.axpy(e, Z, Y), state, Step()) - here) / e

    # One-sided differences: an error of e times the second derivative, some 1e2 / eps = 3e3 slopes.
    assert found == pytest.approx((one_sided(1e-9) + one_sided(-1e-9)) / 2, rel=1e-4)
    assert one_sided(1e-9) != pytest.approx(one_sided(-1e-9), rel=0.1)


def test_with_masks_it_is_the_mean_over_them():
    X, Z, state, step = draw(4), draw(6), state_after(8), Step(max_grad_norm=6.0)
    Y_masks = [draw(5), draw(7, 0.4), draw(8, 2.0)]
    found = mean_response(X, draw(3), Y_masks, state, step)

    def along(e: float) -> float:
        shifted = [tree.axpy(e, Z, Y) for Y in Y_masks]
        return tree.dot(X, mean_direction(draw(3), shifted, state, step).total)

    assert tree.dot(found, Z) == pytest.approx(slope(along, 1e-5), rel=1e-8)
    norms = [tree.norm(Y) for Y in Y_masks]
    assert min(norms) < 6.0 < max(norms)  # some are clipped


def test_it_is_of_float64_whatever_the_gradients_are():
    single = {n: t.float() for n, t in draw(5).items()}
    found = funcprobe.response(draw(3), draw(4), single, state_after(8), max_grad_norm=0.5)
    exact = {n: t.double() for n, t in single.items()}
    expected = funcprobe.response(draw(3), draw(4), exact, state_after(8), max_grad_norm=0.5)
    for n in SHAPES:
        torch.testing.assert_close(found[n], expected[n], rtol=1e-12, atol=1e-14)


def test_what_does_not_fit_is_refused():
    X = draw(4)
    with pytest.raises(ValueError, match="X: names do not match: missing bias"):
        funcprobe.response(draw(3), {n: t for n, t in X.items() if n != "bias"}, X, state_after(8))
    with pytest.raises(InputError, match='rule "adamw" needs exp_avg of every parameter'):
        funcprobe.response(draw(3), X, X, AdamState({}, {}, {}, GROUPS))
