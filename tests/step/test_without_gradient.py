"""The step where every coefficient of J is 0: momentum and weight decay alone, as torch takes it."""

import pytest
import torch

import funcprobe
from funcprobe import AdamGroup, InputError, Step, UpdateBatch, tree
from support.policies import random_batch, random_like

E = random_batch([(0, 3, 4), (1, 5, 2), (2, 1, 6)])
U = random_batch([(0, 3, 4), (0, 3, 2), (1, 4, 3), (1, 4, 3)], seed=1)
STILL = UpdateBatch(U, torch.zeros(4, 4, dtype=torch.float64), torch.ones(4).double())
LR, BETAS, EPS, DECAY = 1e-3, (0.8, 0.95), 1e-8, 0.3


def stepped(probe64) -> tuple[torch.optim.AdamW, dict[str, torch.nn.Parameter]]:
    """torch's optimizer after three steps, its parameters put back."""
    named = {n: torch.nn.Parameter(t.clone()) for n, t in probe64.params.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for seed in range(3):
        for n, g in random_like(probe64.params, seed).items():
            named[n].grad = g
        optimizer.step()
    with torch.no_grad():
        for n, p in named.items():
            p.copy_(probe64.params[n])
    return optimizer, named


def state_of(optimizer, named) -> funcprobe.AdamState:
    kept = {n: optimizer.state[p] for n, p in named.items()}
    return funcprobe.AdamState(
        {n: s["exp_avg"].clone() for n, s in kept.items()},
        {n: s["exp_avg_sq"].clone() for n, s in kept.items()},
        {n: int(s["step"]) for n, s in kept.items()},
        (AdamGroup(tuple(named), LR, *BETAS, EPS, DECAY),),
    )


@pytest.mark.parametrize("clip", [None, 0.1])
def test_it_is_torchs_step_with_a_gradient_of_zero(probe64, clip) -> None:
    optimizer, named = stepped(probe64)
    state = state_of(optimizer, named)
    step = Step(max_grad_norm=clip)
    found = probe64.predict(probe64.params, E, STILL, state, step=step)
    for p in named.values():
        p.grad = torch.zeros_like(p)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(named.values(), clip)
    optimizer.step()
    for n, p in named.items():
        taken = (p.detach() - probe64.params[n]) / LR
        # |theta| < 1 is rounded to 1e-16, over the lr 1e-13; v is of order 1.
        torch.testing.assert_close(found.direction.total[n], taken, rtol=1e-11, atol=1e-12)
        assert taken.any()
    assert not any(g.any() for g in found.Y.values())
    assert found.from_update == 0
    assert found.se_over_u == 0
    assert found.se_total == found.first_order.se > 0
    # Two sums of about 1e3 products each.
    assert found.derivative == pytest.approx(found.from_momentum + found.from_decay, rel=1e-10)
    # nu decays by this step, too: the moments as saved give another one.
    saved = funcprobe.preconditioner(probe64.params, state)[0]
    other = tree.scale(-BETAS[0], tree.multiply(saved, state.exp_avg))
    assert tree.norm(tree.axpy(-1.0, found.direction.momentum, other)) > 1e-3 * tree.norm(other)


def test_no_pass_over_u_is_made(probe64) -> None:
    def never(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("a pass over U")

    state = state_of(*stepped(probe64))
    none = probe64.forward._replace(hidden=never)
    passes = funcprobe.first_order_passes(
        probe64.params, E, STILL, state, probe64.forward, max_tokens=64, update_forward=none
    )
    assert passes.along_PX.logp_NR.shape == STILL.coef_NR.shape
    moving = STILL._replace(coef_NR=STILL.coef_NR + 1.0)
    with pytest.raises(AssertionError, match="a pass over U"):
        funcprobe.first_order_passes(
            probe64.params, E, moving, state, probe64.forward, max_tokens=64, update_forward=none
        )


@pytest.mark.parametrize(
    ("rule", "fresh", "said"),
    [
        ("sgd", False, 'rule "sgd" has no momentum'),
        ("precondition", False, 'rule "precondition" has no momentum'),
        ("adamw", True, "first moments and weight decay are 0 too"),
    ],
)
def test_where_v_is_zero_there_is_no_step(probe64, rule, fresh, said) -> None:
    state = state_of(*stepped(probe64))
    if fresh:
        still = (AdamGroup(tuple(probe64.params), LR, *BETAS, EPS, 0.0),)
        state = funcprobe.fresh_adam_state(probe64.params, still)
    with pytest.raises(InputError, match=said):
        probe64.predict(probe64.params, E, STILL, state, step=Step(rule=rule))


def test_weight_decay_alone_is_a_step(probe64) -> None:
    group = (AdamGroup(tuple(probe64.params), LR, *BETAS, EPS, DECAY),)
    state = funcprobe.fresh_adam_state(probe64.params, group)
    found = probe64.predict(probe64.params, E, STILL, state)
    assert found.from_momentum == 0
    for n, v in found.direction.total.items():
        torch.testing.assert_close(v, -DECAY * probe64.params[n], rtol=1e-15, atol=0)


def test_a_gradient_of_zero_with_coefficients_is_refused(probe64) -> None:
    """Probability 1 for one token, whatever theta is: the objective does not reach the adapter."""
    certain = probe64.forward.readout._replace(bias_V=torch.tensor([1e9, *[0.0] * 10]).double())
    sure = U._replace(tokens_NL=torch.zeros_like(U.tokens_NL))
    with pytest.raises(InputError, match=r"gradient Y .*zero on every tensor.*advantages are not 0"):
        funcprobe.first_order_passes(
            probe64.params,
            E,
            STILL._replace(batch=sure, coef_NR=STILL.coef_NR + 1.0),
            state_of(*stepped(probe64)),
            probe64.forward,
            max_tokens=64,
            update_forward=probe64.forward._replace(readout=certain),
        )
