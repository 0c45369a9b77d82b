"""Advantages and coefficients against plain Python loops written from the papers."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.step.objective import PRESETS, Objective, advantages, coefficients, equal_reward_groups
from funcprobe.types import InputError

MODES = ["mean", "mean_std", "leave_one_out"]
NORMALISATIONS = ["sequence", "token_mean", "sequence_mean", "longest", "constant"]

# Unequal groups, interleaved, prompt numbers neither dense nor sorted, rewards of both signs.
REWARD = [0.0, 1.0, -2.5, 1.0, 0.25, 3.0, 0.0, 1.0, 0.5]
PROMPT = [7, 2, 7, 2, 7, 2, 2, 40, 40]
LENGTH = [3, 1, 5, 2, 4, 9, 2, 6, 1]


def vec(values):
    return torch.tensor(values, dtype=torch.float64)


def advantages_by_loop(reward, prompt, mode):
    out = []
    for i, (r, p) in enumerate(zip(reward, prompt, strict=True)):
        group = [s for s, q in zip(reward, prompt, strict=True) if q == p]
        others = [s for j, s in enumerate(reward) if prompt[j] == p and j != i]
        if mode == "leave_one_out":
            out.append(r - math.fsum(others) / len(others))
        elif mode == "mean":
            out.append(r - statistics.fmean(group))
        else:
            out.append((r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4))
    return out


def coefficients_by_loop(advantage, length, prompt, normalisation, constant):
    n = len(length)
    table = []
    for a, t, p in zip(advantage, length, prompt, strict=True):
        longest = max(u for u, q in zip(length, prompt, strict=True) if q == p)
        z = {
            "sequence": 1 / n,
            "token_mean": 1 / sum(length),
            "sequence_mean": 1 / (n * t),
            "longest": 1 / (n * longest),
            "constant": 1 / (n * constant),
        }[normalisation]
        table.append([a * z if k < t else 0.0 for k in range(max(length))])
    return table


@st.composite
def batches(draw):
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=5))
    prompt = [p for p, size in enumerate(sizes) for _ in range(size)]
    prompt = draw(st.permutations(prompt))
    n = len(prompt)
    # Rewards on a grid of 1/8: far-apart magnitudes would test cancellation, not the formula.
    eighths = draw(st.lists(st.integers(-40, 40), min_size=n, max_size=n))
    length = draw(st.lists(st.integers(1, 12), min_size=n, max_size=n))
    return [e / 8 for e in eighths], list(prompt), length


@pytest.mark.parametrize("mode", MODES)
def test_advantages_equal_the_loop(mode):
    found = advantages(vec(REWARD), torch.tensor(PROMPT), mode)
    assert found.dtype == torch.float64
    # A handful of float64 roundings on numbers of order one.
    torch.testing.assert_close(
        found, vec(advantages_by_loop(REWARD, PROMPT, mode)), rtol=1e-13, atol=1e-14
    )


@given(batches(), st.sampled_from(MODES))
def test_advantages_of_any_groups(batch, mode):
    reward, prompt, _ = batch
    found = advantages(vec(reward), torch.tensor(prompt), mode)
    # mean_std divides a rounding of 1e-16 by as little as 1e-4, hence the absolute 1e-11.
    torch.testing.assert_close(
        found, vec(advantages_by_loop(reward, prompt, mode)), rtol=1e-12, atol=1e-11
    )


@given(batches(), st.sampled_from(MODES), st.sampled_from(NORMALISATIONS), st.randoms())
def test_the_order_of_sequences_does_not_matter(batch, mode, normalisation, random):
    reward, prompt, length = batch
    order = list(range(len(prompt)))
    random.shuffle(order)

    def c(order):
        reward_N, prompt_N, length_N = (
            torch.tensor([x[i] for i in order]) for x in (reward, prompt, length)
        )
        return coefficients(
            advantages(reward_N, prompt_N, mode), length_N, prompt_N, normalisation, 10.0
        )

    torch.testing.assert_close(
        c(order), c(range(len(order)))[order], rtol=1e-12, atol=1e-11
    )  # the sums are taken in another order


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 1e9 + 0.1])
def test_equal_rewards_have_advantage_exactly_zero(mode, reward):
    assert (0.1 + 0.1 + 0.1) / 3 != 0.1, "the rounding this guards against"
    found = advantages(vec([reward] * 3 + [0.0, 1.0]), torch.tensor([5, 5, 5, 1, 1]), mode)
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    assert found[3] < 0 < found[4]


def test_equal_reward_groups_are_counted():
    reward, prompt = vec([0.1, 2.0, 0.1, 2.0, 3.0, 0.1, 9.0]), torch.tensor([4, 1, 4, 1, 2, 4, 2])
    assert equal_reward_groups(reward, prompt) == 2
    assert equal_reward_groups(vec(REWARD), torch.tensor(PROMPT)) == 0


def test_leave_one_out_is_a_multiple_of_the_centred_reward():
    # verl writes RLOO as G / (G - 1) (r - mean).
    reward, prompt = vec([1.0, 0.0, 0.0, 0.5]), torch.tensor([0, 0, 0, 0])
    torch.testing.assert_close(
        advantages(reward, prompt, "leave_one_out"), 4 / 3 * advantages(reward, prompt, "mean")
    )


@given(batches(), st.sampled_from(NORMALISATIONS), st.floats(0.5, 100))
def test_coefficients_equal_the_loop(batch, normalisation, constant):
    advantage, prompt, length = batch
    found = coefficients(
        vec(advantage), torch.tensor(length), torch.tensor(prompt), normalisation, constant
    )
    expected = vec(coefficients_by_loop(advantage, length, prompt, normalisation, constant))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)  # two roundings each


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_coefficients_are_zero_past_the_end(normalisation):
    length = torch.tensor(LENGTH)
    found = coefficients(vec(REWARD) + 0.1, length, torch.tensor(PROMPT), normalisation, 16)
    past = torch.arange(9)[None, :] >= length[:, None]
    assert found.shape == (9, 9)
    assert bool((found[past] == 0).all())
    assert bool((found[~past] != 0).all())


def trl_loss(name, logp, mask, advantage, limit):
    """Minus J as TRL's GRPOTrainer and RLOOTrainer reduce it, ratios 1, one process."""
    per_token = -logp * advantage[:, None]
    return {
        "grpo": ((per_token * mask).sum(-1) / mask.sum(-1)).mean(),
        "dapo": (per_token * mask).sum() / mask.sum(),
        "dr_grpo": (per_token * mask).sum() / (per_token.size(0) * limit),
        "rloo": -((logp * mask).sum(1) * advantage).mean(),
    }[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_reduce_as_the_trainer_does(name):
    prompt, length, limit = torch.tensor([3, 3, 3, 1, 1, 1]), torch.tensor([2, 5, 1, 4, 3, 3]), 11
    reward = vec([1.0, 0.0, 0.5, 0.0, 0.0, 2.0])
    logp = -torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(5)[None, :] < length[:, None]).double()
    grouped = reward.view(2, 3)
    advantage = {
        "grpo": (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4),
        "dr_grpo": grouped - grouped.mean(1, keepdim=True),
        "rloo": grouped - (grouped.sum(1, keepdim=True) - grouped) / 2,
    }
    advantage["dapo"] = advantage["grpo"]

    objective = PRESETS[name]._replace(constant=limit)
    found = coefficients(
        advantages(reward, prompt, objective.advantage),
        length,
        prompt,
        objective.normalisation,
        objective.constant,
    )
    expected = -trl_loss(name, logp, mask, advantage[name].flatten(), limit)
    torch.testing.assert_close((found * logp).sum(), expected, rtol=1e-12, atol=1e-13)


def test_only_dr_grpo_leaves_its_constant_open():
    assert {name for name, o in PRESETS.items() if o.normalisation == "constant"} == {"dr_grpo"}
    assert PRESETS["dr_grpo"] == Objective("mean", "constant", None)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_response_has_no_advantage(mode):
    with pytest.raises(InputError, match=r"prompt 9 has one response.*at least 2"):
        advantages(vec([0.0, 1.0, 1.0]), torch.tensor([4, 9, 4]), mode)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="reward of sequence 1"):
        advantages(vec([0.0, bad]), torch.tensor([0, 0]), "mean")
    with pytest.raises(InputError, match="reward of sequence 1"):
        equal_reward_groups(vec([0.0, bad]), torch.tensor([0, 0]))


@pytest.mark.parametrize("constant", [None, 0, -3.0, math.nan, math.inf])
def test_the_constant_is_required(constant):
    with pytest.raises(InputError, match="positive number of tokens"):
        coefficients(vec([1.0, -1.0]), torch.tensor([2, 1]), torch.tensor([0, 0]), "constant", constant)


def test_other_inputs_that_cannot_be_used():
    two = torch.tensor([0, 0])
    with pytest.raises(InputError, match="unknown advantage 'median': expected one of mean,"):
        advantages(vec([0.0, 1.0]), two, "median")
    with pytest.raises(InputError, match="unknown normalisation 'tokens'"):
        coefficients(vec([0.0, 1.0]), two + 1, two, "tokens")
    with pytest.raises(InputError, match="sequence 1 has 0 response tokens"):
        coefficients(vec([0.0, 1.0]), torch.tensor([2, 0]), two, "sequence")
    with pytest.raises(InputError, match="one entry per sequence"):
        advantages(vec([0.0, 1.0, 2.0]), two, "mean")
    with pytest.raises(InputError, match="one entry per sequence"):
        advantages(vec([]), torch.tensor([], dtype=torch.int64), "mean")


def test_arguments_are_left_as_they_were():
    reward, prompt, length = vec(REWARD), torch.tensor(PROMPT), torch.tensor(LENGTH)
    for mode in MODES:
        coefficients(advantages(reward, prompt, mode), length, prompt, "longest")
    assert reward.tolist() == REWARD
    assert prompt.tolist() == PROMPT
    assert length.tolist() == LENGTH
