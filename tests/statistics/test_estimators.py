"""The eight estimators against a policy small enough to enumerate, loops, and resampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import Entropy, TokenStats, tree
from funcprobe.statistics import second_order
from funcprobe.statistics.weights import by_unit
from support.enumerated import ETA, VOCABULARY, population
from support.estimators import ESTIMATORS, each_estimator, random_statistics, rows
from support.policies import random_batch, random_like, tiny_policy


def test_probabilities_of_all_responses_sum_to_one(world):
    assert float(world.probability.sum()) == pytest.approx(1, abs=1e-12)
    # The policy must not be trivial, or its estimators would agree by accident.
    assert world.exact["token"][0] > 0.3
    assert abs(world.exact["token"][1]) > 1e-2
    assert abs(world.exact["token"][2] / (ETA * world.exact["token"][1]) - 1) > 1e-3


@each_estimator
def test_population_value_is_exact(world, entropy):
    """Sums over 625 rows a prompt in float64: 1e-8 leaves six digits for their rounding."""
    index = population(world)
    mask = funcprobe.response_mask(world.batch)[index]
    stats, tangent, moved = (rows(s, index) for s in (world.stats, world.tangent, world.moved))
    log_ratio = (stats.logp_NR + math.log(VOCABULARY)) * mask
    unit = torch.arange(len(index))
    H, slope, change = world.exact[entropy.per]
    assert funcprobe.entropy_value(stats, mask, entropy, log_ratio) == pytest.approx(H, abs=1e-8)
    first = funcprobe.first_order(stats, tangent, mask, unit, entropy, log_ratio)
    assert first.derivative == pytest.approx(slope, abs=1e-8)
    seen = funcprobe.measured_change(stats, moved, mask, entropy, log_ratio)
    assert seen.delta == pytest.approx(change, abs=1e-8)


@pytest.mark.parametrize("count", [512])
@each_estimator
def test_standard_error_covers_the_truth(world, entropy, count):
    """z of the derivative over 200 seeds; the error of a mean of 200 is 0.07, of their sd 0.05.

    Both prompts are the whole population here, so that the draws are the sampling units.
    """
    generator = torch.Generator().manual_seed(5)
    mask_all = funcprobe.response_mask(world.batch)
    _, slope, _ = world.exact[entropy.per]
    z, jackknife = [], []
    for _ in range(200):
        index = torch.multinomial(world.probability, count, replacement=True, generator=generator)
        first = funcprobe.first_order(
            rows(world.stats, index),
            rows(world.tangent, index),
            mask_all[index],
            torch.arange(count),
            entropy,
        )
        z.append((first.derivative - slope) / first.se)
        jackknife.append(first.se_jackknife / first.se)
    z = torch.tensor(z)
    assert abs(float(z.mean())) < 0.2
    assert 0.85 < float(z.std()) < 1.15
    # Jackknife and delta method differ by O(1/n) of a smooth function.
    assert abs(float(torch.tensor(jackknife).mean()) - 1) < 0.03


@each_estimator
def test_measured_follows_the_prediction_on_every_batch(world, entropy):
    """The two share their noise: on 32 draws their ratio is 1 to the curvature, not to an error."""
    index = torch.multinomial(world.probability, 32, generator=torch.Generator().manual_seed(2))
    mask = funcprobe.response_mask(world.batch)[index]
    stats, tangent = rows(world.stats, index), rows(world.tangent, index)
    first = funcprobe.first_order(stats, tangent, mask, torch.arange(32), entropy)
    gaps = []
    for eta in (1e-4, 1e-5):
        moved = TokenStats(*(s + eta * t for s, t in zip(stats, tangent, strict=True)))
        delta = funcprobe.measured_change(stats, moved, mask, entropy).delta
        gaps.append(abs(delta / (eta * first.derivative) - 1))
    assert gaps[1] < 1e-2
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.1, abs=1e-9)


@each_estimator
def test_values_by_a_loop(entropy):
    """Plain loops over sequences and positions, weights that are not 1, one response cut short."""
    stats, moved, log_ratio, mask = random_statistics(seed=1)
    H = {}
    for name, s, extra in (("start", stats, 0), ("moved", moved, moved.logp_NR - stats.logp_NR)):
        H[name] = loop_entropy(s, log_ratio + extra * mask, mask, entropy)
    assert funcprobe.entropy_value(stats, mask, entropy, log_ratio) == pytest.approx(H["start"])
    delta = funcprobe.measured_change(stats, moved, mask, entropy, log_ratio).delta
    assert delta == pytest.approx(H["moved"] - H["start"], rel=1e-10)


@each_estimator
def test_clipped_weights_by_a_loop_and_by_differences(entropy):
    stats, moved, log_ratio, mask = random_statistics(seed=4)
    clipped = entropy._replace(clip=1.3)
    H = [
        loop_entropy(s, r, mask, clipped)
        for s, r in ((stats, log_ratio), (moved, log_ratio + (moved.logp_NR - stats.logp_NR) * mask))
    ]
    seen = funcprobe.measured_change(stats, moved, mask, clipped, log_ratio)
    assert seen.delta == pytest.approx(H[1] - H[0], rel=1e-10)
    log_N = ((log_ratio + moved.logp_NR - stats.logp_NR) * mask).sum(1).tolist()
    whole = [min(math.exp(x), 1.3) for x in log_N]
    assert seen.weight_N.tolist() == pytest.approx(whole)
    assert seen.ess == pytest.approx(sum(whole) ** 2 / sum(w * w for w in whole))
    assert seen.max_weight == pytest.approx(4 * max(whole) / sum(whole))
    assert seen.clipped == whole.count(1.3) == 2
    eta = 1e-6  # central difference: error eta^2, rounding 1e-16 / eta
    tangent = TokenStats(*(m - s for m, s in zip(moved, stats, strict=True)))

    def at(eta):
        there = TokenStats(*(s + eta * t for s, t in zip(stats, tangent, strict=True)))
        return loop_entropy(there, log_ratio + eta * tangent.logp_NR * mask, mask, clipped)

    first = funcprobe.first_order(stats, tangent, mask, torch.arange(4), clipped, log_ratio)
    assert first.derivative == pytest.approx((at(eta) - at(-eta)) / (2 * eta), rel=1e-7)
    assert float(first.per_sequence_N.sum()) == pytest.approx(first.derivative, rel=1e-10)


def loop_entropy(stats, log_ratio, mask, entropy):
    """README.md's formulas, sum by sum."""
    N, R = mask.shape
    length = mask.sum(1).tolist()
    inclusive = entropy.integrand == "sampled"

    def z(i, k):
        return float(stats.entropy_NR[i, k]) if not inclusive else -float(stats.logp_NR[i, k])

    def w(i, k):
        stop = min(k + (1 if inclusive else 0), length[i])
        stop = length[i] if entropy.weights == "sequence" else stop
        weight = math.exp(sum(float(log_ratio[i, j]) for j in range(stop)))
        return weight if entropy.clip is None else min(weight, entropy.clip)

    if entropy.per == "token":
        cells = [(i, k) for i in range(N) for k in range(length[i])]
        return sum(w(i, k) * z(i, k) for i, k in cells) / sum(w(i, k) for i, k in cells)
    total = 0.0
    for k in range(R):
        here = [i for i in range(N) if length[i] > k]
        total += sum(w(i, k) * z(i, k) for i in here) / sum(w(i, k) for i in range(N))
    return total


@each_estimator
def test_gradient_coefficients_are_the_derivative(entropy):
    """X by reverse mode and the sum of tangents, on a model: float64 rounding only."""
    probe = funcprobe.bind(tiny_policy(), entropy=entropy, max_tokens=64)
    batch = random_batch([(0, 3, 4), (1, 5, 2), (0, 3, 1), (2, 1, 7), (3, 4, 4)])
    v = random_like(probe.params)
    stats, tangent = probe.tangents(probe.params, batch, v)
    first = funcprobe.first_order(
        stats, tangent, funcprobe.response_mask(batch), batch.prompt_N, entropy
    )
    assert tree.dot(probe.grad_X(probe.params, batch), v) == pytest.approx(first.derivative, rel=1e-9)


@each_estimator
def test_influence_is_the_derivative_of_the_estimate_in_a_units_weight(entropy):
    """Gateaux: weigh unit m by 1 + e (by copies: 10^4 of each, 10^4 + 1 of one)."""
    stats, moved, _, mask = random_statistics(seed=2)
    tangent = TokenStats(*(m - s for m, s in zip(moved, stats, strict=True)))
    unit = torch.tensor([0, 1, 0, 2])  # sequences 0 and 2 are one prompt
    first = funcprobe.first_order(stats, tangent, mask, unit, entropy)
    change = funcprobe.measured_change(stats, moved, mask, entropy)
    influence_M = by_unit(first.influence_N, unit)
    change_M = by_unit(change.influence_N, unit)
    assert float(influence_M.sum()) == pytest.approx(0, abs=1e-12)
    assert float(change_M.sum()) == pytest.approx(0, abs=1e-12)
    copies = 10_000
    for m in range(3):
        index = torch.arange(4).repeat(copies)
        index = torch.cat([index, (unit == m).nonzero().squeeze(1)])
        heavier = funcprobe.first_order(
            rows(stats, index), rows(tangent, index), mask[index], torch.arange(len(index)), entropy
        )
        slope = (heavier.derivative - first.derivative) * copies
        # First difference of step 1e-4: its error is the second derivative times 1e-4.
        assert slope == pytest.approx(float(influence_M[m]), rel=1e-3, abs=1e-6)
        more = funcprobe.measured_change(rows(stats, index), rows(moved, index), mask[index], entropy)
        slope = (more.delta - change.delta) * copies
        assert slope == pytest.approx(float(change_M[m]), rel=1e-3, abs=1e-6)


def test_jackknife_by_a_loop():
    stats, moved, _, mask = random_statistics(seed=3)
    tangent = TokenStats(*(m - s for m, s in zip(moved, stats, strict=True)))
    unit = torch.tensor([7, 7, 1, 4])
    for entropy in ESTIMATORS:
        left = []
        for m in (7, 1, 4):
            keep = (unit != m).nonzero().squeeze(1)
            part = [rows(s, keep) for s in (stats, tangent)]
            # The unit column must have two values; each kept sequence is its own here.
            left.append(
                funcprobe.first_order(*part, mask[keep], torch.arange(len(keep)), entropy).derivative
            )
        mean = sum(left) / 3
        expected = math.sqrt(2 / 3 * sum((x - mean) ** 2 for x in left))
        first = funcprobe.first_order(stats, tangent, mask, unit, entropy)
        assert first.se_jackknife == pytest.approx(expected, rel=1e-10)


def test_per_sequence_error_is_the_variance_of_s_n():
    """per="sequence" with whole-response weights: the variance of the influence, over B_E."""
    stats, moved, _, mask = random_statistics(seed=6)
    tangent = TokenStats(*(m - s for m, s in zip(moved, stats, strict=True)))
    entropy = Entropy("sequence", "rao_blackwell", "sequence")
    first = funcprobe.first_order(stats, tangent, mask, torch.arange(4), entropy)
    h, a = stats.entropy_NR.sum(1), tangent.logp_NR.sum(1)
    s = tangent.entropy_NR.sum(1) + a * h - a * h.mean()
    # The self-normalised weight's own noise enters through the mean of a.
    influence = s - s.mean() - a.mean() * (h - h.mean())
    assert first.se == pytest.approx(math.sqrt(float(influence.var()) / 4), rel=1e-10)
    assert float(first.per_sequence_N.sum()) == pytest.approx(first.derivative, rel=1e-10)


def test_one_unit_has_no_standard_error():
    stats, moved, _, mask = random_statistics(seed=1)
    unit = torch.zeros(4, dtype=torch.long)
    with pytest.raises(funcprobe.InputError, match="at least two prompts"):
        funcprobe.first_order(stats, moved, mask, unit, Entropy())


@each_estimator
def test_no_move_is_exactly_zero(entropy):
    stats, _, log_ratio, mask = random_statistics(seed=1)
    seen = funcprobe.measured_change(stats, stats, mask, entropy, log_ratio)
    assert seen.delta == 0
    plain = funcprobe.measured_change(stats, stats, mask, entropy)
    assert plain[:4] == (0.0, 4.0, 1.0, 0)
    assert not plain.influence_N.any()
    assert bool((plain.weight_N == 1).all())


def test_effective_sample_size_and_largest_weight():
    stats, moved, log_ratio, mask = random_statistics(seed=1)
    seen = funcprobe.measured_change(stats, moved, mask, Entropy(), log_ratio)
    w = ((log_ratio + moved.logp_NR - stats.logp_NR) * mask).sum(1).exp()
    assert seen.ess == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))
    assert seen.max_weight == pytest.approx(float(w.max() / w.mean()))


@settings(max_examples=25)
@given(st.permutations(range(4)), st.integers(0, 3), st.sampled_from(ESTIMATORS))
def test_order_and_padding_change_nothing(order, padding, entropy):
    stats, moved, log_ratio, mask = random_statistics(seed=8)
    order = torch.tensor(order)

    def pad(x):
        return torch.nn.functional.pad(x[order], (0, padding))

    other = [TokenStats(*(pad(x) for x in s)) for s in (stats, moved)]
    unit = torch.tensor([0, 1, 0, 2])
    here = funcprobe.measured_change(stats, moved, mask, entropy, log_ratio)
    there = funcprobe.measured_change(*other, pad(mask), entropy, pad(log_ratio))
    assert there.delta == pytest.approx(here.delta, rel=1e-12)
    here = funcprobe.first_order(stats, moved, mask, unit, entropy, log_ratio)
    there = funcprobe.first_order(*other, pad(mask), unit[order], entropy, pad(log_ratio))
    for field in ("derivative", "se", "se_jackknife"):
        assert getattr(there, field) == pytest.approx(getattr(here, field), rel=1e-10)


@pytest.mark.parametrize(("n", "count", "draws"), [(1, 1, 800), (16, 64, 50)])
def test_rounding_noise_is_what_no_parabola_explains(n, count, draws):
    """Odd part 3 eta, even part 40 eta^2, noise of known size in each term: only the noise is found.

    In the sum of `count` such terms, its variance is `count` times as large.
    """
    noise, eta = 1e-9, 1e-5
    generator = torch.Generator().manual_seed(0)
    slope_n = torch.linspace(1, 5, n).double()
    found = []
    for _ in range(draws):
        draw = noise * torch.randn(2, 2, n, generator=generator, dtype=torch.float64)
        plus, minus = (
            tuple(
                sign * slope_n * e + 40 * e * e + x_n
                for e, x_n in zip((eta / 2, eta), row, strict=True)
            )
            for sign, row in zip((1, -1), draw, strict=True)
        )
        found.append(second_order.rounding_noise(plus, minus, count) ** 2)
    # 1600 squares of a normal: relative error 0.035 of their mean.
    assert sum(found) / draws == pytest.approx(count * noise**2, rel=0.15, abs=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_even_and_odd_rounding_each_make_half_of_the_variance(sign):
    """A quadratic form of independent noise: its mean is the sum over perturbations, one at a time.

    Noise of variance 1 in four changes is, in each of two even and of two odd parts, of variance 1/2.
    """
    size, zero = (torch.tensor([x], dtype=torch.float64) for x in (math.sqrt(1 / 2), 0.0))
    found = [
        second_order.rounding_noise(part, (sign * part[0], sign * part[1]), 1)
        for part in ((size, zero), (zero, size))
    ]
    assert sum(noise**2 for noise in found) == pytest.approx(1 / 2, rel=1e-12)
