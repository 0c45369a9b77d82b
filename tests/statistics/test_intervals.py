"""Intervals against scipy, enumeration, loops, and the spread of what they are intervals of."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import Entropy, TokenStats
from funcprobe.statistics import estimators, intervals
from funcprobe.statistics.intervals import Error, Interval

ENTROPY = Entropy(baseline="none")
ETA = 0.3


def population(count=600, seed=0):
    """Statistics, tangents and moved statistics of skewed, correlated sequences of 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.randint(1, 6, (count, 1), generator=generator)

    def draw():
        return torch.randn(count, 5, generator=generator, dtype=torch.float64)

    h = draw().abs() * mask
    stats = TokenStats(-h, h)
    tangent = TokenStats((0.2 * draw() + 0.1 * h) * mask, (0.2 * draw() - 0.1 * h.square()) * mask)
    moved = TokenStats(*(s + ETA * t + 0.02 * t.square() for s, t in zip(stats, tangent, strict=True)))
    return stats, tangent, moved, mask


def rows(parts, index):
    *stats, mask = parts
    return [TokenStats(*(x[index] for x in s)) for s in stats] + [mask[index]]


def cells_of(parts):
    """n, d, n', d', dn, dd"""
    stats, tangent, moved, mask = parts
    first = estimators.first_order_cells(stats, tangent, mask, ENTROPY)
    return *first, *estimators.measured_cells(stats, moved, mask, ENTROPY)[2:]


def derivative(n, d, dn, dd, *_):
    return estimators.ratio_derivative(n, d, dn, dd).sum(-1)


def difference(n, d, dn, dd, cn, cd):
    """Measured change minus eta times the derivative."""
    change = estimators.ratio_change(n, d, cn, cd) - ETA * estimators.ratio_derivative(n, d, dn, dd)
    return change.sum(-1)


def pair(parts, unit):
    stats, tangent, moved, mask = parts
    first = estimators.first_order(stats, tangent, mask, unit, ENTROPY)
    return first, estimators.measured_change(stats, moved, mask, ENTROPY)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("dof", [0.8, 1, 2, 2.7, 9, 63, 99, 100, 255.5, 1023, 1e5, 1e9])
def test_student_quantile_is_scipys(level, dof):
    """Both are good to about 1e-13 here; 99 and 100 lie on either side of the asymptotic series."""
    expected = scipy.stats.t.ppf((1 + level) / 2, dof)
    assert intervals.student_quantile(level, dof) == pytest.approx(expected, rel=1e-11)


def test_student_is_the_quantile_times_the_error_on_either_side():
    low, high = intervals.student(3.0, Error(2.0, 7), level=0.8)
    t = scipy.stats.t.ppf(0.9, 7)
    assert (low, high) == pytest.approx((3 - 2 * t, 3 + 2 * t))


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
def test_levels_outside_the_unit_interval_are_refused(level):
    with pytest.raises(funcprobe.InputError, match="between 0 and 1"):
        intervals.student(0.0, Error(1.0, 5), level)


def test_degrees_of_freedom_are_those_of_the_sample_variance():
    """All 5^5 samples of five from five values: 2 / dof is the relative variance of their variance."""
    values = torch.tensor([-1.0, -0.5, -0.5, -1.0, 3.0], dtype=torch.float64)
    samples = torch.tensor(list(itertools.product(values.tolist(), repeat=5)), dtype=torch.float64)
    spread = samples.var(1)
    relative = float(spread.var(correction=0)) / float(values.var(correction=0)) ** 2
    assert intervals.variance_dof(values) == pytest.approx(min(4, 2 / relative), rel=1e-12)
    assert 2 / relative < 4  # so that the cap is not what is tested


def test_degrees_of_freedom_are_capped_and_fall_with_the_tail():
    assert intervals.variance_dof(torch.tensor([1.0, -1.0] * 8)) == 15
    assert intervals.variance_dof(torch.zeros(4)) == 3
    one = torch.zeros(100, dtype=torch.float64)
    one[0] = 1.0  # kurtosis 100
    assert intervals.variance_dof(one) == pytest.approx(200 / (100 - 97 / 99))
    assert intervals.variance_dof(1e-200 * one) == pytest.approx(200 / (100 - 97 / 99))


def test_total_by_welch_and_satterthwaite():
    """Two samples' difference of means: scipy's Welch test has the same degrees of freedom."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 9), rng.normal(1, 3, 14)
    parts = [Error(x.std(ddof=1) / math.sqrt(len(x)), len(x) - 1) for x in (a, b)]
    found = intervals.student(a.mean() - b.mean(), intervals.total(*parts), 0.9)
    expected = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert found == pytest.approx((expected.low, expected.high), rel=1e-10)
    assert intervals.total(Error(0.0, 4), Error(0.0, 9)) == Error(0.0, 4)
    assert intervals.total(Error(2.0, 4), Error(0.0, 9)) == pytest.approx((2.0, 4))


def test_delta_jackknife_and_bootstrap_agree_to_first_order():
    """600 units: delta and jackknife differ by O(1 / M), a bootstrap of 4000 by 1 / sqrt(8000)."""
    parts, unit = population(), torch.arange(600)
    first, change = pair(parts, unit)
    cells = cells_of(parts)
    for f, estimate, influence in (
        (derivative, first.derivative, first.influence_N),
        (
            difference,
            change.delta - ETA * first.derivative,
            change.influence_N - ETA * first.influence_N,
        ),
    ):
        delta = intervals.delta_error(influence, unit)
        left_out = intervals.jackknife(cells, unit, f)
        resampled = intervals.bootstrap(cells, unit, f, torch.Generator().manual_seed(0), 4000)
        assert intervals.jackknife_error(left_out) == pytest.approx(delta, rel=0.02)
        assert float(resampled.std()) == pytest.approx(delta.se, rel=0.05)
        ends = intervals.student(estimate, delta)
        width = ends.high - ends.low
        assert intervals.basic(estimate, resampled) == pytest.approx(ends, abs=0.1 * width)


def test_jackknife_is_that_of_the_estimator():
    parts = population(40)
    unit = torch.arange(40) // 3
    first, _ = pair(parts, unit)
    error = intervals.jackknife_error(intervals.jackknife(cells_of(parts), unit, derivative))
    assert error.se == pytest.approx(first.se_jackknife, rel=1e-12)
    assert error.se != pytest.approx(first.se, rel=1e-3)


def test_bootstrap_is_the_estimator_on_sequences_drawn_again():
    """Units 7, 7, 2, 5, ...: every sequence of a unit comes as often as the unit."""
    parts = population(12)
    unit = torch.tensor([7, 7, 2, 5, 2, 9, 9, 9, 1, 5, 7, 3])
    found = intervals.bootstrap(cells_of(parts), unit, difference, torch.Generator().manual_seed(3), 5)
    counts = intervals.bootstrap_counts(6, 5, torch.Generator().manual_seed(3))
    assert counts.sum(1).tolist() == [6.0] * 5
    assert len({tuple(row) for row in counts.tolist()}) > 1
    for value, times in zip(found.tolist(), counts.tolist(), strict=True):
        again = dict(zip([1, 2, 3, 5, 7, 9], times, strict=True))
        index = torch.tensor([i for i, u in enumerate(unit.tolist()) for _ in range(int(again[u]))])
        first, change = pair(rows(parts, index), torch.arange(len(index)))
        assert value == pytest.approx(change.delta - ETA * first.derivative, rel=1e-9)


def test_basic_mirrors_the_quantiles():
    resampled = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    assert intervals.basic(4.0, resampled, level=0.5) == Interval(5.0, 7.0)


def test_repeats_of_a_unit_are_no_new_information():
    """Every sequence twice: as clusters nothing changes, as units the error falls by sqrt(2)."""
    parts = population(50)
    once, twice = torch.arange(50), torch.arange(50).repeat(2)
    first, _ = pair(parts, once)
    doubled = rows(parts, twice)
    again, _ = pair(doubled, twice)
    expected = intervals.delta_error(first.influence_N, once)
    assert intervals.delta_error(again.influence_N, twice) == pytest.approx(expected, rel=1e-10)
    assert intervals.jackknife_error(
        intervals.jackknife(cells_of(doubled), twice, derivative)
    ) == pytest.approx(
        intervals.jackknife_error(intervals.jackknife(cells_of(parts), once, derivative)), rel=1e-10
    )
    a, b = (
        intervals.bootstrap(cells_of(p), u, derivative, torch.Generator().manual_seed(1), 50)
        for p, u in ((parts, once), (doubled, twice))
    )
    assert torch.allclose(a, b, rtol=1e-10)
    naive = intervals.delta_error(again.influence_N, torch.arange(100))
    assert naive.se == pytest.approx(
        expected.se / math.sqrt(2) * math.sqrt(100 / 99 * 49 / 50), rel=1e-9
    )


@settings(max_examples=10)
@given(st.permutations(range(12)))
def test_order_changes_nothing(order):
    parts, order = population(12), torch.tensor(order)
    unit = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 6])
    found = []
    for p, u in ((parts, unit), (rows(parts, order), unit[order])):
        first, _ = pair(p, u)
        resampled = intervals.bootstrap(
            cells_of(p), u, difference, torch.Generator().manual_seed(2), 20
        )
        error = intervals.delta_error(first.influence_N, u)
        over = intervals.update_error([(p[0].logp_NR.sum(1), p[3].sum(1).double())], u)
        jackknife = intervals.jackknife(cells_of(p), u, derivative)
        found.append([*error, *over, *jackknife.tolist(), *resampled.tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_error_over_U_of_equal_shares():
    """sqrt(M) times the units' standard deviation, and the kurtosis about their mean."""
    t = torch.tensor([10.0, 9.0, -4.0, 12.0, 8.5, 10.5, 34.0], dtype=torch.float64)
    unit = torch.tensor([0, 1, 0, 2, 3, 4, 5])
    sums = np.array([6.0, 9.0, 12.0, 8.5, 10.5, 34.0])
    half, one = 0.5, 1.0
    shares = torch.tensor([half, one, half, one, one, one, one], dtype=torch.float64)
    error = intervals.update_error([(t, 7 * shares)], unit)
    assert error.se == pytest.approx(math.sqrt(6) * sums.std(ddof=1))
    dof = 12 / (scipy.stats.kurtosis(sums, fisher=False) - 3 / 5)
    assert dof < 5
    assert error.dof == pytest.approx(dof)


def mean_error(x):
    """Of the mean of independent values."""
    return intervals.update_error([(x / len(x), torch.ones(len(x)))], torch.arange(len(x)))


def coverage(draw, batches):
    """Shares of batches in which each interval held its truth."""
    return np.mean([draw() for _ in range(batches)], axis=0)


def test_intervals_of_batches_hold_the_population_value():
    """600 batches of 200: a share near 0.95 has a standard error of 0.009; four of them are allowed.

    The difference's own spread over the batches is the brute force; errors added as if independent
    would be far from it, since measured and predicted share their noise.
    """
    parts, generator = population(), torch.Generator().manual_seed(8)
    first, change = pair(parts, torch.arange(600))
    truth = (first.derivative, change.delta, change.delta - ETA * first.derivative)
    held, seen, spread = [], [], []
    unit = torch.arange(200)
    for _ in range(600):
        index = torch.randint(600, (200,), generator=generator)
        here, there = pair(rows(parts, index), unit)
        influence = there.influence_N - ETA * here.influence_N
        errors = [
            intervals.delta_error(x, unit) for x in (here.influence_N, there.influence_N, influence)
        ]
        values = (here.derivative, there.delta, there.delta - ETA * here.derivative)
        ends = [intervals.student(v, e) for v, e in zip(values, errors, strict=True)]
        held.append([low <= t <= high for (low, high), t in zip(ends, truth, strict=True)])
        seen.append(values[2])
        spread.append((errors[2].se, math.hypot(errors[1].se, ETA * errors[0].se)))
    assert np.mean(held, axis=0) == pytest.approx([0.95] * 3, abs=0.036)
    # The sd of 600 has a relative error of 0.03, more where tails are heavy.
    own, independent = np.mean(spread, axis=0)
    assert own == pytest.approx(np.std(seen), rel=0.12)
    assert independent > 2 * own


def test_total_holds_the_value_along_the_mean_step():
    """A linear model s_nm = x_n y_m with means: 800 draws of 60 sequences and 20 prompts.

    Shares near 0.95 have a standard error of 0.008. Over a new U's step the total is too small by that
    U's own spread, which `total` of three parts holds.
    """
    generator = torch.Generator().manual_seed(4)

    def sample(count):
        return 2 + torch.randn(count, generator=generator, dtype=torch.float64)

    def draw():
        x, y = sample(60), sample(20)
        estimate = float(x.mean() * y.mean())
        of_E = mean_error(x * y.mean())
        of_U = mean_error(y * x.mean())
        new = 2 * float(sample(20).mean())
        held = []
        for error, truth in (
            (of_E, 2 * float(y.mean())),
            (of_U, 2 * float(x.mean())),
            (intervals.total(of_E, of_U), 4.0),
            (intervals.total(of_E, of_U, of_U), new),
            (of_E, 4.0),
            (intervals.total(of_E, of_U), new),
        ):
            low, high = intervals.student(estimate, error)
            held.append(low <= truth <= high)
        return held

    *right, alone, too_small = coverage(draw, 800)
    assert right == pytest.approx([0.95] * 4, abs=0.032)
    assert alone < 0.85
    assert too_small < 0.92


def test_heavy_tails_get_the_wider_quantile():
    """Of 400 samples of 30 from a distribution with kurtosis of hundreds, M - 1 misses more."""
    rng = np.random.default_rng(1)
    held = []
    for _ in range(400):
        x = torch.tensor(rng.standard_t(2.5, 30) ** 3)
        error = mean_error(x)
        plain = intervals.student(float(x.mean()), Error(error.se, 29))
        heavy = intervals.student(float(x.mean()), error)
        assert heavy.low <= plain.low
        held.append([low <= 0 <= high for low, high in (plain, heavy)])
    plain, heavy = np.mean(held, axis=0)
    assert heavy > plain


def test_one_unit_has_no_interval():
    cells, unit = cells_of(population(4)), torch.zeros(4, dtype=torch.long)
    for call in (
        lambda: intervals.delta_error(torch.ones(4), unit),
        lambda: intervals.update_error([(torch.ones(4), torch.ones(4))], unit),
        lambda: intervals.bootstrap(cells, unit, derivative, torch.Generator()),
        lambda: intervals.jackknife_error(torch.ones(1)),
    ):
        with pytest.raises(funcprobe.InputError, match="at least two"):
            call()
