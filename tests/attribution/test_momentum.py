"""Momentum split by step, by earlier checkpoint and by prompt, against torch.optim.AdamW itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprobe
from funcprobe import AdamGroup, AdamState, InputError, Params, Step, UpdateBatch, tree
from support.policies import random_batch, random_like

SHAPES = {"a.lora_A": (3, 5), "a.lora_B": (4, 3), "b.lora_A": (2, 7)}
# Groups of unequal everything, in another order than the names.
KINDS = (
    (("b.lora_A", "a.lora_A"), 2e-4, (0.8, 0.95), 1e-2, 0.3),
    (("a.lora_B",), 5e-4, (0.9, 0.99), 3e-2, 0.0),
)
GROUPS = tuple(AdamGroup(names, lr, *betas, eps, decay) for names, lr, betas, eps, decay in KINDS)
STEPS = 7
PLAIN = Step()


def draw(seed: int) -> Params:
    return random_like({n: torch.zeros(shape).double() for n, shape in SHAPES.items()}, seed)


class Trained:
    """Parameters and state after `steps` steps of torch's AdamW, and the gradients, newest first."""

    def __init__(self, steps: int = STEPS, drop: int | None = None) -> None:
        """`drop`: the gradient of that many steps ago is 0."""
        theta = {n: torch.nn.Parameter(t) for n, t in draw(1).items()}
        groups = [
            {"params": [theta[n] for n in names], "lr": lr, "betas": b, "eps": eps, "weight_decay": w}
            for names, lr, b, eps, w in KINDS
        ]
        optimizer = torch.optim.AdamW(groups)
        self.gradients: list[Params] = []
        for s in range(steps):
            dropped = drop == steps - 1 - s
            g = tree.scale(0.0 if dropped else 1.0, draw(10 + s))
            for n, p in theta.items():
                p.grad = g[n].clone()
            optimizer.step()
            self.gradients.insert(0, g)
        self.params = {n: p.detach() for n, p in theta.items()}
        states = {n: optimizer.state[p] for n, p in theta.items()}
        self.state = AdamState(
            {n: x["exp_avg"] for n, x in states.items()},
            {n: x["exp_avg_sq"] for n, x in states.items()},
            {n: int(x["step"]) for n, x in states.items()},
            GROUPS,
        )


X, Y = draw(2), draw(3)
TRAINED = Trained()


def momentum(state: AdamState, step: Step = PLAIN) -> float:
    v = funcprobe.update_direction(TRAINED.params, Y, state, **step._asdict())
    return tree.dot(X, v.momentum)


@pytest.mark.parametrize("step", [Step(), Step(max_grad_norm=0.5)])
def test_each_step_is_what_its_gradient_adds(step):
    """Against a training without that gradient: exp_avg is linear in it. Second moments are kept."""
    t = TRAINED
    found = funcprobe.momentum_by_step(X, t.params, (Y,), t.state, t.gradients, step=step)
    assert found.total == pytest.approx(momentum(t.state, step), rel=1e-12)
    assert abs(found.before) < 1e-14
    assert found.rest < 1e-15
    for ago, part in enumerate(found.by_step):
        without = t.state._replace(exp_avg=Trained(drop=ago).state.exp_avg)
        difference = momentum(t.state, step) - momentum(without, step)
        assert part == pytest.approx(difference, rel=1e-9, abs=1e-12)
    assert len({round(part, 12) for part in found.by_step}) == STEPS


@given(count=st.integers(0, STEPS))
def test_what_is_not_recorded_is_the_decayed_moment(count):
    """Of the last `count` gradients: before them is beta1^count times exp_avg then, by the group's."""
    t, earlier = TRAINED, Trained(STEPS - count) if count < STEPS else None
    found = funcprobe.momentum_by_step(X, t.params, (Y,), t.state, iter(t.gradients[:count]))
    assert len(found.by_step) == count
    assert found.total == pytest.approx(momentum(t.state), rel=1e-12)
    kept = tree.zeros(X)
    if earlier is not None:
        beta1 = {n: group.beta1 for group in GROUPS for n in group.names}
        kept = {n: beta1[n] ** count * m for n, m in earlier.state.exp_avg.items()}
    then = momentum(t.state._replace(exp_avg=kept))
    assert found.before == pytest.approx(then, rel=1e-9, abs=1e-13)
    assert found.rest == pytest.approx(tree.norm(kept) / tree.norm(t.state.exp_avg), abs=1e-12)
    if earlier is not None and count:
        since = funcprobe.momentum_since(X, t.params, (Y,), t.state, earlier.state)
        assert since.before == pytest.approx(found.before, rel=1e-9)
        assert since.since == pytest.approx(sum(found.by_step), rel=1e-9, abs=1e-12)


def test_several_masks_and_other_rules():
    t, masks = TRAINED, (Y, draw(4))
    found = funcprobe.momentum_by_step(X, t.params, masks, t.state, t.gradients)
    each = [tree.dot(X, funcprobe.update_direction(t.params, one, t.state).momentum) for one in masks]
    assert found.total == pytest.approx(sum(each) / 2, rel=1e-12)
    found = funcprobe.momentum_by_step(X, t.params, (Y,), t.state, t.gradients, step=Step("sgd"))
    assert found.total == 0


def test_what_does_not_fit_is_refused():
    t = TRAINED
    given = (X, t.params, (Y,), t.state)
    with pytest.raises(InputError, match="8 gradients of steps are given, but Adam has taken 7"):
        funcprobe.momentum_by_step(*given, [*t.gradients, Y])
    bad = Y | {"a.lora_B": torch.full((4, 3), torch.nan)}
    with pytest.raises(InputError, match=r"gradient of a\.lora_B, 1 steps before, is not finite"):
        funcprobe.momentum_by_step(*given, [Y, bad])
    with pytest.raises(ValueError, match=r"recorded gradient: names do not match: missing a\.lora_A"):
        funcprobe.momentum_by_step(*given, [{n: Y[n] for n in ("a.lora_B", "b.lora_A")}])
    with pytest.raises(ValueError, match=r"a\.lora_A has shape \(5, 3\), expected \(3, 5\)"):
        funcprobe.momentum_by_step(*given, [Y | {"a.lora_A": Y["a.lora_A"].T}])
    with pytest.raises(InputError, match="earlier state has taken 7 steps, this one 7, 0 later"):
        funcprobe.momentum_since(*given, t.state)


# By prompt, on a policy.

U = random_batch([(0, 2, 3), (0, 2, 6), (1, 5, 1), (4, 5, 4), (1, 5, 2)], seed=2)


def recorded_update() -> UpdateBatch:
    mask = funcprobe.response_mask(U)
    c, d = random_like(
        {"c": torch.zeros(mask.shape).double(), "d": torch.zeros(mask.shape).double()}, 6
    ).values()
    ones = torch.ones(len(mask)).double()
    return UpdateBatch(U, 0.1 * c * mask, ones, 0.1 * d * mask, ones)


@pytest.mark.parametrize("max_grad_norm", [None, 0.02])
def test_prompts_of_a_step_sum_to_its_gradient(probe64, max_grad_norm):
    """At the parameters of that step; each against its own gradient by reverse mode."""
    then, update = probe64.params, recorded_update()
    names = list(then)
    groups = (
        AdamGroup(tuple(names[::2]), 2e-4, 0.8, 0.95, 1e-3, 0.3),
        AdamGroup(tuple(names[1::2]), 5e-4, 0.9, 0.99, 2e-3, 0.0),
    )
    nu = {n: t.square() for n, t in random_like(then, 5).items()}
    state = AdamState(random_like(then, 4), nu, dict.fromkeys(names, 9), groups)
    now = tree.axpy(0.1, random_like(then, 8), then)
    X, Y = random_like(then, 1), random_like(then, 3)
    gradient_then = funcprobe.grad_Y(then, update, probe64.forward)
    clip = 1.0
    if max_grad_norm:
        clip = max_grad_norm / (tree.norm(gradient_then) + 1e-6)
        assert clip < 1
    recorded = tree.scale(-clip, gradient_then)
    scale = funcprobe.moment_scale(now, (Y,), state, Step())
    options = {"max_grad_norm": max_grad_norm}
    found = funcprobe.recomputed_step(
        X, scale, state, recorded, 2, then, update, probe64.forward, **options
    )
    assert found.clip_coefficient == pytest.approx(clip, rel=1e-12)
    assert found.gradient_residual < 1e-12
    assert found.shares.total == pytest.approx(found.recorded, rel=1e-9)
    assert found.residual == found.recorded - found.shares.total
    by_step = funcprobe.momentum_by_step(X, now, (Y,), state, [Y, Y, recorded]).by_step
    assert found.recorded == pytest.approx(by_step[2], rel=1e-12)
    assert found.shares.prompt_index_M.tolist() == [0, 1, 4]
    for m, share in zip((0, 1, 4), found.shares.prompt_M, strict=True):
        own_N1 = (U.prompt_N == m)[:, None]
        alone = update._replace(
            coef_NR=update.coef_NR * own_N1, entropy_coef_NR=update.entropy_coef_NR * own_N1
        )
        g = tree.scale(-clip, funcprobe.grad_Y(then, alone, probe64.forward))
        expected = funcprobe.momentum_by_step(X, now, (Y,), state, [Y, Y, g]).by_step[2]
        assert float(share) == pytest.approx(expected, rel=1e-9)
    # At today's parameters it is an approximation, and the residuals say so.
    near = funcprobe.recomputed_step(
        X, scale, state, recorded, 2, now, update, probe64.forward, **options
    )
    assert near.recorded == found.recorded
    assert near.gradient_residual > 0.01
    assert abs(near.residual) > 1e-4 * abs(near.recorded)


def test_a_step_without_gradient_has_no_shares(probe64):
    then, update = probe64.params, recorded_update()
    still = update._replace(coef_NR=0 * update.coef_NR, entropy_coef_NR=0 * update.entropy_coef_NR)
    state = AdamState(
        random_like(then, 4),
        {n: t.square() for n, t in random_like(then, 5).items()},
        dict.fromkeys(then, 9),
        (AdamGroup(tuple(then), 1e-3, 0.9, 0.99, 1e-8, 0.0),),
    )
    scale = funcprobe.moment_scale(then, (random_like(then, 3),), state, Step())
    for gradient, residual in ((tree.zeros(then), 0.0), (random_like(then, 3), 1.0)):
        found = funcprobe.recomputed_step(
            random_like(then, 1), scale, state, gradient, 0, then, still, probe64.forward
        )
        assert found.shares.total == 0
        assert found.gradient_residual == residual
