"""The step without a part of U, against the step from a gradient of what stays."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import funcprobe
from funcprobe import InputError, Step, UpdateBatch, tree
from support.attribution import (
    BOUNDED,
    CLIPPED,
    LENGTHS_U,
    PLAIN,
    PROMPTS_U,
    STEPS,
    E,
    U,
    adam_state,
    attributed,
    no_model,
    update_of,
)
from support.policies import tiny_policy

MASK = funcprobe.response_mask(U.batch)


def left_out(probe: Any, passes: Any, leaving: UpdateBatch, update=U, **given: Any) -> Any:
    given = {"state": adam_state(probe.params), "forward": probe.forward, **given}
    state, forward = given.pop("state"), given.pop("forward")
    return funcprobe.leave_out(probe.params, passes, update, leaving, state, forward, **given)


def staying(left_NR: torch.Tensor, factor: float = 1.0) -> UpdateBatch:
    """U with weight 0 for the tokens that leave, all others as they are."""
    weight_NR = factor * (1 - left_NR.double())
    return U._replace(coef_NR=weight_NR * U.coef_NR, entropy_coef_NR=weight_NR * U.entropy_coef_NR)


def tokens(prompt: int | None = None, row: int | None = None, token: Any = None) -> torch.Tensor:
    left_NR = torch.zeros_like(MASK)
    if prompt is not None:
        left_NR[U.batch.prompt_N == prompt] = True
    if row is not None:
        left_NR[row] = True
    if token is not None:
        left_NR[token] = True
    return left_NR & MASK


PARTS = {
    "prompt": ({"prompts": [1]}, tokens(prompt=1)),
    "sequence": ({"sequences": [3]}, tokens(row=3)),
    "token": ({"tokens_NR": tokens(token=(1, 4))}, tokens(token=(1, 4))),
    "all three": (
        {"prompts": [0], "sequences": [5], "tokens_NR": tokens(token=(4, 0))},
        tokens(0, 5, (4, 0)),
    ),
}


@pytest.mark.parametrize(
    ("step", "part"),
    [*((CLIPPED, part) for part in PARTS), *((step, "all three") for step in STEPS if step != CLIPPED)],
)
def test_the_step_is_that_of_what_stays(probe64, step, part):
    """A prediction of a U in which what leaves has weight 0: v', its parts and <X, v'>."""
    passes, _ = attributed(probe64, step=step)
    chosen, left_NR = PARTS[part]
    found = left_out(probe64, passes, funcprobe.subset(U, **chosen), step=step)
    Y = probe64.grad_Y(probe64.params, staying(left_NR))
    expected = funcprobe.update_direction(
        probe64.params, Y, adam_state(probe64.params), **step._asdict()
    )
    # Y - Y_left has 1e-16 of Y; entries of the bounded step at which Y' nearly vanishes, no more.
    for name, v in expected.total.items():
        torch.testing.assert_close(found.direction.total[name], v, rtol=1e-9, atol=1e-12)
    assert found.without == pytest.approx(tree.dot(passes.X, expected.total), rel=1e-9)
    assert found.direction.clip_coefficient == pytest.approx(expected.clip_coefficient, rel=1e-12)
    assert found.change == found.without - found.derivative


@pytest.mark.parametrize("step", [PLAIN, CLIPPED, BOUNDED], ids=["plain", "clipped", "bounded"])
def test_share_and_marginal_are_those_of_the_tables(probe64, step):
    passes, table = attributed(probe64, step=step)
    state = adam_state(probe64.params)
    predicted = funcprobe.summarise(probe64.params, passes, E, U, state, step=step)
    for m, share, marginal in zip(
        (0, 1, 2, 4), table.update.prompt_M, table.marginal.prompt_M, strict=True
    ):
        found = left_out(probe64, passes, funcprobe.subset(U, prompts=[m]), step=step)
        assert found.share == pytest.approx(float(share), rel=1e-9)
        assert found.marginal == pytest.approx(float(marginal), rel=1e-9)
        assert found.derivative == pytest.approx(predicted.bars_dot, rel=1e-12)
        if step.rule == "adamw":
            assert abs(found.change + found.share) > 1e-3 * abs(found.share)


@settings(max_examples=4)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=3),
    rule=st.sampled_from(["sgd", "precondition"]),
    seed=st.integers(0, 1000),
)
def test_where_v_is_linear_leaving_a_prompt_out_takes_its_share(probe64, rows, rule, seed):
    """Exact but for rounding: 1e-10 of the sum of absolute shares, some 1e5 additions in float64."""
    update = update_of([(9, 3, 2), *((m, m + 1, t) for m, t in rows)], seed, entropy=seed % 2 == 0)
    passes, table = attributed(probe64, update, step=Step(rule))
    size = 1e-10 * float(table.update.prompt_M.abs().sum())
    for m, share in zip(table.update.prompt_index_M.tolist(), table.update.prompt_M, strict=True):
        leaving = funcprobe.subset(update, prompts=[m])
        found = left_out(probe64, passes, leaving, update, step=Step(rule))
        for expected in (float(share), found.share, found.marginal):
            assert found.change == pytest.approx(-expected, rel=0, abs=size)


def test_a_divisor_made_again_is_that_of_the_sequences_that_stay(probe64):
    batch = U.batch
    advantage_N = torch.tensor([0.5, -0.5, 1.0, 0.3, -1.0, 0.2], dtype=torch.float64)
    for normalisation in ("token_mean", "sequence_mean"):
        update = funcprobe.update_batch(batch, advantage_N, normalisation)
        passes, _ = attributed(probe64, update, step=CLIPPED)
        leaving = funcprobe.subset(update, prompts=[1])
        found = left_out(probe64, passes, leaving, update, step=CLIPPED, renormalise=True)
        rest = torch.tensor([0, 1, 3, 5])
        again = funcprobe.update_batch(funcprobe.select(batch, rest), advantage_N[rest], normalisation)
        Y = probe64.grad_Y(probe64.params, again)
        v = funcprobe.update_direction(
            probe64.params, Y, adam_state(probe64.params), **CLIPPED._asdict()
        )
        for name, t in v.total.items():
            torch.testing.assert_close(found.direction.total[name], t, rtol=1e-9, atol=1e-12)
        plain = left_out(probe64, passes, leaving, update, step=Step("sgd"))
        scaled = left_out(probe64, passes, leaving, update, step=Step("sgd"), renormalise=True)
        left = 3 / 21 if normalisation == "token_mean" else 2 / 6
        assert scaled.without == pytest.approx(plain.without / (1 - left), rel=1e-12)


def test_only_what_leaves_is_passed(probe64):
    passed: list[int] = []

    def counting(params, rows):
        passed.append(int(rows.tokens_NL.shape[0]))
        seen.extend(rows.sequence_T.tolist())
        return probe64.forward.hidden(params, rows)

    seen: list[int] = []
    passes, _ = attributed(probe64)
    forward = probe64.forward._replace(hidden=counting)
    left_out(probe64, passes, funcprobe.subset(U, sequences=[1]), forward=forward)
    assert seen == [0] * LENGTHS_U[1][2]  # one sequence, its six tokens
    seen.clear()
    left_out(probe64, passes, funcprobe.subset(U, prompts=[1]), forward=forward)
    assert len(seen) == sum(LENGTHS_U[n][2] for n in PROMPTS_U[1])
    still = U._replace(
        coef_NR=U.coef_NR * (U.batch.prompt_N != 1)[:, None],
        entropy_coef_NR=U.entropy_coef_NR * (U.batch.prompt_N != 1)[:, None],
    )
    passes, _ = attributed(probe64, still)
    nothing = probe64.forward._replace(hidden=no_model)
    found = left_out(probe64, passes, funcprobe.subset(still, prompts=[1]), still, forward=nothing)
    assert found.change == found.share == found.marginal == 0


def test_every_mask_of_dropout_loses_its_own_part():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear")
        model = get_peft_model(tiny_policy().unload(), config).double().eval()
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.3)
    probe = funcprobe.bind(model, max_tokens=64)
    masks = funcprobe.masked_forwards(model, probe.params, probe.forward, 3, seed=1)
    passes, _ = attributed(probe, step=CLIPPED, masks=masks)
    found = left_out(probe, passes, funcprobe.subset(U, prompts=[1]), step=CLIPPED, masks=masks)
    state = adam_state(probe.params)
    stays = staying(tokens(prompt=1))
    Y_masks = [funcprobe.grad_Y(probe.params, stays, mask) for mask in masks]
    expected = funcprobe.step.masked.mean_direction(probe.params, Y_masks, state, CLIPPED)
    for name, v in expected.total.items():
        torch.testing.assert_close(found.direction.total[name], v, rtol=1e-9, atol=1e-12)
    shares = [
        left_out(probe, passes, funcprobe.subset(U, prompts=[m]), step=CLIPPED, masks=masks).share
        for m in (0, 1, 2, 4)
    ]
    whole = funcprobe.module_shares(passes.X, probe.params, passes.Y, state, CLIPPED)
    assert sum(shares) == pytest.approx(whole.total.update, rel=1e-9)
    with pytest.raises(InputError, match="is of 3 dropout masks, 0 are given"):
        left_out(probe, passes, funcprobe.subset(U, prompts=[1]), step=CLIPPED)


def test_the_change_is_measured_at_theta_plus_eta_v(probe64):
    """Measured / predicted tends to 1 for the step without a prompt, too."""
    passes, _ = attributed(probe64, step=CLIPPED)
    found = left_out(probe64, passes, funcprobe.subset(U, prompts=[1]), step=CLIPPED)
    v, eta = found.direction.total, 1e-6
    measured = probe64.measure(probe64.params, E, v, eta, passes.stats).delta
    # The quadratic term is eta times the ratio of the second derivative to the first.
    assert measured / (eta * found.without) == pytest.approx(1, abs=1e-3)


def test_a_subset_holds_the_divisors_of_whole_sequences():
    part = funcprobe.subset(U, prompts=[1], tokens_NR=tokens(token=(0, 0)))
    assert torch.equal(part.coef_NR, U.coef_NR * tokens(prompt=1, token=(0, 0)))
    assert part.normaliser_N.tolist() == [0, 0, 1, 0, 2, 0]
    assert part.entropy_normaliser_N.tolist() == [0, 0, 1, 0, 1, 0]
    assert funcprobe.subset(U, tokens_NR=MASK).normaliser_N.tolist() == [3, 6, 1, 4, 2, 5]
    plain = funcprobe.subset(UpdateBatch(U.batch, U.coef_NR), sequences=[0])
    assert plain.normaliser_N is plain.entropy_coef_NR is plain.entropy_normaliser_N is None


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"prompts": [3]}, r"prompt 3 is not in U: one of its 4 is expected \(0, 1, 2, 4\)"),
        ({"sequences": [-1]}, "sequence -1 is not in U"),
        ({"prompts": [1, 1]}, "prompt 1 of U is named twice"),
        ({}, "no token of U is chosen"),
        ({"tokens_NR": ~MASK}, "no token of U is chosen"),
        (
            {"tokens_NR": MASK[:, :3]},
            r"shape \(6, 3\): a boolean mask of U's response tokens, \(6, 6\)",
        ),
        ({"tokens_NR": MASK.double()}, "tokens_NR is torch.float64"),
    ],
)
def test_what_is_not_in_U_cannot_be_chosen(chosen, says):
    with pytest.raises(InputError, match=says) as error:
        funcprobe.subset(U, **chosen)
    assert "\n" not in str(error.value)


def test_nothing_left_and_no_part_are_refused_before_any_pass(probe64):
    passes, _ = attributed(probe64)
    given = {"forward": probe64.forward._replace(hidden=no_model)}
    cases = [
        (funcprobe.subset(U, tokens_NR=MASK), {}, "everything that has a coefficient leaves U"),
        (U._replace(coef_NR=2 * U.coef_NR), {}, "what leaves is no part of U"),
        (U._replace(coef_NR=U.coef_NR[:, :2]), {}, "what leaves is no part of U"),
        (funcprobe.subset(U, prompts=[1]), {"renormalise": True}, "divisors of c and d would change"),
        (funcprobe.subset(U, prompts=[1]), {"masks": [probe64.forward] * 2}, "of 1 dropout masks, 2"),
    ]
    for leaving, more, says in cases:
        with pytest.raises(InputError, match=says) as error:
            left_out(probe64, passes, leaving, **given, **more)
        assert "\n" not in str(error.value)
    unknown = U._replace(normaliser_N=None)
    with pytest.raises(InputError, match="normaliser_N is not set"):
        left_out(probe64, passes, funcprobe.subset(unknown, prompts=[1]), unknown, renormalise=True)
    # All tokens that have coefficients may leave with their divisor, and others stay.
    c_only = UpdateBatch(U.batch, U.coef_NR, torch.tensor([1.0, 1, 1, 1, 1, 0]))
    part = funcprobe.subset(c_only, sequences=[0, 1, 2, 3, 4])
    with pytest.raises(InputError, match="nothing of the divisor of J stays"):
        left_out(probe64, passes, part, c_only, renormalise=True)
