"""The error over U against loops: prompts left out of J, and J's derivative in the prompts' weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import InputError
from funcprobe.statistics import intervals

NORMALISATIONS = ["sequence", "token_mean", "sequence_mean", "longest", "constant"]
L = 5.0  # of "constant", in tokens

sequences = st.tuples(
    st.integers(1, 7),  # length
    st.floats(-2, 2, allow_subnormal=False),  # advantage
    st.floats(-3, 3, allow_subnormal=False),  # slope of a token
)
batches = st.lists(st.lists(sequences, min_size=1, max_size=4), min_size=2, max_size=6)
each_normalisation = pytest.mark.parametrize("normalisation", NORMALISATIONS)


def collated(groups):
    """Groups of (length, advantage, slope) -> batch, advantages, slopes of the tokens [N, R]."""
    flat = [(m, *one) for m, group in enumerate(groups) for one in group]
    batch = funcprobe.collate(
        [[1]] * len(flat), [[2] * length for _, length, _, _ in flat], [5 * m + 1 for m, *_ in flat]
    )
    advantage_N = torch.tensor([a for _, _, a, _ in flat], dtype=torch.float64)
    slope_N = torch.tensor([s for *_, s in flat], dtype=torch.float64)
    k = torch.arange(int(batch.response_length_N.max())).double()
    return batch, advantage_N, slope_N[:, None] * (1 + 0.3 * k) * funcprobe.response_mask(batch)


def update_of(groups, normalisation):
    """U, and t_n for the given slopes."""
    batch, advantage_N, slope_NR = collated(groups)
    update = funcprobe.update_batch(batch, advantage_N, normalisation, L)
    return update, (update.coef_NR * slope_NR).sum(1)


def weighted_total(groups, normalisation, weight_M):
    """sum_n t_n where prompt m counts weight_m times, in J and in what J is divided by; a loop."""
    total, divisor = 0.0, 0.0
    for weight, group in zip(weight_M, groups, strict=True):
        longest = max(length for length, _, _ in group)
        for length, advantage, slope in group:
            own = {"sequence_mean": length, "longest": longest, "constant": L}.get(normalisation, 1.0)
            tokens = sum(slope * (1 + 0.3 * k) for k in range(length))
            total += weight * advantage * tokens / own
            divisor += weight * (length if normalisation == "token_mean" else 1)
    return total / divisor


@each_normalisation
@settings(max_examples=25)
@given(batches)
def test_influence_is_the_derivative_in_a_prompts_weight(normalisation, groups):
    """Central differences at 1e-4: their error is 1e-8 times the third derivative, of order total."""
    update, t_N = update_of(groups, normalisation)
    found = funcprobe.update_influence(t_N, update.normaliser_N)
    size = float(t_N.abs().sum())
    assert abs(float(found.sum())) <= 1e-12 * size
    assert float(t_N.sum()) == pytest.approx(
        weighted_total(groups, normalisation, [1.0] * len(groups)), rel=1e-12, abs=1e-13 * size
    )
    index = update.batch.prompt_N
    for m in range(len(groups)):
        plus, minus = (
            weighted_total(groups, normalisation, [1 + e * (i == m) for i in range(len(groups))])
            for e in (1e-4, -1e-4)
        )
        expected = (plus - minus) / 2e-4
        assert float(found[index == 5 * m + 1].sum()) == pytest.approx(
            expected, rel=1e-7, abs=1e-7 * size
        )


@each_normalisation
@settings(max_examples=25)
@given(batches)
def test_error_is_the_jackknife_of_the_step(normalisation, groups):
    """J made again without each prompt in turn, its divisor included."""
    update, t_N = update_of(groups, normalisation)
    left_out = torch.stack(
        [
            update_of([g for i, g in enumerate(groups) if i != m], normalisation)[1].sum()
            for m in range(len(groups))
        ]
    )
    expected = intervals.jackknife_error(left_out)
    found = intervals.update_error([(t_N, update.normaliser_N)], update.batch.prompt_N)
    # Leaving out a prompt that has most of the tokens magnifies rounding by their ratio, up to 100.
    size = float(t_N.abs().sum())
    assert found.se == pytest.approx(expected.se, rel=1e-9, abs=1e-12 * size)
    if expected.se > 1e-9 * size:  # else the kurtosis is of rounding
        assert found.dof == pytest.approx(expected.dof, rel=1e-6)


def test_the_normaliser_shrinks_and_widens_the_error():
    """Prompts of 1 to 4 tokens a response: t proportional to their tokens does not vary at all."""
    lengths, unit = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4]).double(), torch.arange(8) // 2
    naive = math.sqrt(4 * float(torch.tensor([2.0, 4, 6, 8]).var()))
    same = intervals.update_error([(lengths, lengths)], unit)
    assert same.se < 1e-12 * naive
    against = intervals.update_error([(5 - lengths, lengths)], unit)
    assert against.se > 1.5 * naive


@each_normalisation
def test_scale_of_the_normaliser_does_not_matter(normalisation):
    groups = [[(3, 1.0, 0.4), (1, -1.0, 2.0)], [(6, 0.5, -1.0)], [(2, 2.0, 0.3), (2, 1.0, 0.1)]]
    update, t_N = update_of(groups, normalisation)
    one, other = (
        intervals.update_error([(t_N, scale * update.normaliser_N)], update.batch.prompt_N)
        for scale in (1, 1e3)
    )
    assert one == pytest.approx(other, rel=1e-12)
    # Groups of unequal size are unequal shares of every divisor, also where tokens do not count.
    assert update.normaliser_N.tolist() == (
        [3, 1, 6, 2, 2] if normalisation == "token_mean" else [1] * 5
    )


def test_update_batch_is_coefficients():
    batch, advantage_N, _ = collated([[(3, 1.0, 0.4), (1, -1.0, 2.0)], [(6, 0.5, -1.0)]])
    for normalisation in NORMALISATIONS:
        given_T = (advantage_N, batch.response_length_N, batch.prompt_N, normalisation, L)
        found = funcprobe.update_batch(batch, advantage_N, normalisation, L)
        assert torch.equal(found.coef_NR, funcprobe.coefficients(*given_T))
        assert found.batch is batch
    with pytest.raises(InputError, match="unknown normalisation"):
        funcprobe.update_batch(batch, advantage_N, "tokens")
    with pytest.raises(InputError, match="positive number of tokens"):
        funcprobe.update_batch(batch, advantage_N, "constant")


def test_a_prompt_with_all_of_a_divisor():
    """Without it nothing is left of its part: the parts that others have are left out as before."""
    t, prompt = torch.tensor([3.0, -1.0, 0.0, 0.0]).double(), torch.tensor([0, 0, 1, 2])
    tokens = torch.tensor([2.0, 1.0, 0.0, 0.0]).double()
    even, ones = (
        torch.tensor([0.5, 0.25, 0.5, 1.0]).double(),
        torch.tensor([1.0, 1.0, 2.0, 2.0]).double(),
    )
    found = intervals.update_error([(t, tokens), (even, ones)], prompt)
    left = [float(even[2:].sum() * 6 / 4)]  # of prompt 0, all of the first part
    left += [2 + float(even[[0, 1, other]].sum() * 6 / 4) for other in (3, 2)]
    total = 2 + float(even.sum())
    expected = intervals.jackknife_error(torch.tensor(left).double() - total)
    assert found == pytest.approx(expected)
