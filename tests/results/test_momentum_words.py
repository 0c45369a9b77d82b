"""Momentum in words: percentages of one sign, amounts of two, and what is left out of a line."""

import types

import pytest
import torch

import funcprobe
from funcprobe.adapters.results.momentum import momentum_lines, momentum_section
from funcprobe.adapters.rollouts import Rollouts
from funcprobe.adapters.stages.momentum import Momentum, StepPrompts
from funcprobe.attribution.token_shares import token_shares


def section(by_step=(), before=0.0, taken=9, prompts=(), since=None):
    steps = funcprobe.MomentumSteps(tuple(by_step), before, 0.125) if by_step else None
    whole = sum(by_step) + before if by_step else sum(since)
    found = Momentum(taken, steps, tuple(prompts), 4 if since else None, since)
    entropy = types.SimpleNamespace(entropy=funcprobe.Entropy())
    prediction = types.SimpleNamespace(from_momentum=whole)
    predicted = types.SimpleNamespace(plan=entropy, prediction=prediction)
    return momentum_section(predicted, found)


def test_percentages_of_one_sign():
    made = section([-41.0, -22.0, -20.0], -17.0)
    assert [one.step for one in made.by_step] == [9, 8, 7]
    assert [one.fraction for one in made.by_step] == [0.41, 0.22, 0.2]
    assert (made.momentum, made.before, made.all_steps, made.unexplained) == (-100, -17, False, 0.125)
    assert made.unit == "nats per token per unit of learning rate"
    assert momentum_lines(made, 1e-3) == [
        "momentum by step: 1 step ago 41 %, 2 steps ago 22 %, 3 steps ago 20 %, before the first "
        "recorded 17 %"
    ]


def test_amounts_where_signs_differ():
    (line,) = momentum_lines(section([-4.0, 3.0], 0.5), 1e-3)
    assert line.endswith(
        "1 step ago -4.0e-03, 2 steps ago +3.0e-03, before the first recorded +5.0e-04 nats per token "
        "at lr 0.001"
    )
    (line,) = momentum_lines(section([-4.0, 3.0], 0.5), 0.0)
    assert "1 step ago -4.0e+00" in line
    assert line.endswith("nats per token per unit of learning rate")


def test_a_long_ring_and_a_whole_run():
    (line,) = momentum_lines(section([1.0] * 7, 3.0), 1e-3)
    assert "5 steps ago 10 %, 6 to 7 steps ago 20 %, before the first recorded 30 %" in line
    made = section([3.0, 1.0], 1e-9, taken=2)
    assert made.all_steps
    (line,) = momentum_lines(made, 1e-3)
    assert line == (
        "momentum by step: 1 step ago 75 %, 2 steps ago 25 %; these are all 2 steps of the run "
        "(unexplained of the first moment: 1e-01)"
    )
    still = section([0.0, 0.0])
    assert still.by_step[0].fraction is None
    assert "1 step ago +0.0e+00" in momentum_lines(still, 1e-3)[0]


def test_an_earlier_checkpoint_alone():
    made = section(since=funcprobe.MomentumSince(before=-1.0, since=-3.0))
    assert (made.by_step, made.before, made.unexplained) == ((), None, None)
    assert momentum_lines(made, 0.1) == [
        "momentum by checkpoint: since step 4 75 %, of that step and before 25 %"
    ]
    assert momentum_lines(None, 0.1) == []


def test_prompts_that_cancel_beyond_the_named_are_amounts():
    index = list(range(9))
    ids = [[2, 3]] * 9
    share_N = torch.tensor([6.0, 5.0, 5.0, 4.0, -4.0, 4.0, -4.0, 4.0, -4.0]).double()
    shares = token_shares(
        share_N[:, None] / 2 * torch.ones(9, 2).double(), funcprobe.collate(ids, ids, index)
    )
    found = funcprobe.RecomputedStep(shares.total, shares, 0.0, 1.0)
    texts = [f"{i} ?" for i in index]
    rows = Rollouts(index, texts, texts, ids, ids, ["stop"] * 9, 1.0)
    made = section([shares.total], 0.0, prompts=[StepPrompts(9, rows, found)])
    assert made.by_prompt[0].absolute == 40
    line = momentum_lines(made, 1e-3)[-1]
    assert line.startswith("momentum of step 9 by prompt: '0 ?' +6.0e-03, ")
    assert "%" not in line


@pytest.mark.parametrize("count", [2, 12])
def test_prompts_of_a_step(count):
    """The largest first, at most ten; text of a data set does nothing in a terminal. The line that all
    prompts begin with is left out."""
    index = list(range(3, 3 + count))
    ids = [[2, 3]] * count
    texts = [f"Sum:\n\x1b[2J {i} ?" for i in index]
    batch = funcprobe.collate(ids, ids, index)
    share_NR = torch.arange(1, count + 1).double()[:, None] * torch.tensor([[0.5, 0.5]]).double()
    shares = token_shares(share_NR, batch)
    recorded = shares.total + 1e-6
    found = funcprobe.RecomputedStep(recorded, shares, 3e-7, 0.25)
    rows = Rollouts(index, texts, texts, ids, ids, ["stop"] * count, 1.0)
    made = section([recorded], 0.0, prompts=[StepPrompts(9, rows, found)])
    (step,) = made.by_prompt
    assert (step.step, step.clip_coefficient, step.gradient_residual) == (9, 0.25, 3e-7)
    assert step.residual == pytest.approx(1e-6, rel=1e-3)
    assert [one.prompt_index for one in step.prompts] == index[::-1][:10]
    assert step.prompts[0].share == count
    _, line = momentum_lines(made, 1e-3)
    assert "\x1b" not in line
    assert "\n" not in line
    assert f"by prompt: '\\x1b[2J {index[-1]} ?' " in line
    assert line.endswith("(gradient recomputed to 3.0e-07)")
    assert "residual +1.0e-06 of" in line
