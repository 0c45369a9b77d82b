"""Baselines: nothing they take off has an expectation, and prediction and measurement share it."""

import itertools
import math

import pytest
import torch
from conftest import random_batch, random_like, tiny_policy
from test_estimators import VOCABULARY, population, rows, world  # noqa: F401

import funcprobe
from funcprobe import Entropy, InputError, TokenStats, tree
from funcprobe.policy.layout import select
from funcprobe.statistics import baselines, estimators, regression

CONTROLLED = [
    Entropy(per, "rao_blackwell", weights)
    for per, weights in itertools.product(("token", "sequence"), ("per_decision", "sequence"))
]
each_controlled = pytest.mark.parametrize("entropy", CONTROLLED, ids=lambda e: f"{e.per}-{e.weights}")
KINDS = ("none", "entropy", "position", "ridge")


def of_prefix(batch, mask_NR):
    """A baseline of no merit that the tokens before j decide, prompt included; of the size of Q."""
    b_NR = torch.zeros(mask_NR.shape, dtype=torch.float64)
    for i, k in mask_NR.nonzero().tolist():
        before = batch.tokens_NL[i, : int(batch.prompt_length_N[i]) + k].tolist()
        b_NR[i, k] = 2 * math.sin(sum((j + 1.7) * (u + 1) for j, u in enumerate(before)))
    return b_NR


@each_controlled
def test_population_value_is_unchanged(world, entropy):  # noqa: F811
    """Every response of the tiny policy, off-policy (a uniform sampler): 1e-8 as without a baseline."""
    index = population(world)
    batch = select(world.batch, index)
    mask = funcprobe.response_mask(batch)
    stats, tangent, moved = (rows(s, index) for s in (world.stats, world.tangent, world.moved))
    log_ratio = (stats.logp_NR + math.log(VOCABULARY)) * mask
    b = of_prefix(world.batch, funcprobe.response_mask(world.batch))[index]
    _, slope, change = world.exact[entropy.per]
    controlled = baselines.controlled_tangent(tangent, b, mask, entropy, log_ratio)
    first = estimators.first_order(
        stats, controlled, mask, torch.arange(len(index)), entropy, log_ratio
    )
    assert first.derivative == pytest.approx(slope, abs=1e-8)
    there = baselines.controlled_stats(stats, moved, b, mask, entropy, log_ratio)
    seen = estimators.measured_change(stats, there, mask, entropy, log_ratio)
    assert seen.delta == pytest.approx(change, abs=1e-8)
    # Not because it does nothing: on its own batch of 40 it changes both.
    few = torch.arange(0, len(index), len(index) // 40)
    bare = estimators.first_order(rows(stats, few), rows(tangent, few), mask[few], few, entropy)
    with_b = baselines.controlled_tangent(rows(tangent, few), b[few], mask[few], entropy)
    other = estimators.first_order(rows(stats, few), with_b, mask[few], few, entropy)
    assert abs(other.derivative / bare.derivative - 1) > 0.05


@each_controlled
def test_a_baseline_that_sees_the_token_is_caught(world, entropy):  # noqa: F811
    """The oracle above can fail: with the token itself in b the population value is another."""
    index = population(world)
    mask = funcprobe.response_mask(world.batch)[index]
    stats, tangent = rows(world.stats, index), rows(world.tangent, index)
    log_ratio = (stats.logp_NR + math.log(VOCABULARY)) * mask
    controlled = baselines.controlled_tangent(tangent, -stats.logp_NR, mask, entropy, log_ratio)
    first = estimators.first_order(
        stats, controlled, mask, torch.arange(len(index)), entropy, log_ratio
    )
    assert abs(first.derivative - world.exact[entropy.per][1]) > 1e-3


@pytest.fixture(scope="module")
def small():
    """30 draws of 10 prompts, with statistics around theta and ratios to another sampler."""
    probe = funcprobe.bind(tiny_policy())
    lengths = [(i // 3, 2 + i // 3 % 3, 1 + (5 * i) % 7) for i in range(30)]
    batch = random_batch(lengths, seed=3)
    v = tree.scale(0.02, random_like(probe.params))
    stats, tangent = probe.tangents(probe.params, batch, v)
    mask = funcprobe.response_mask(batch)
    sampler = 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)).double() * mask

    def moved(eta: float) -> TokenStats:
        return probe.token_stats(tree.axpy(eta, v, probe.params), batch)

    return probe, batch, v, stats, tangent, mask, sampler, moved


@each_controlled
@pytest.mark.parametrize("off_policy", [False, True])
def test_prediction_is_the_derivative_of_the_measured(small, entropy, off_policy):
    """Differences of fourth order at 1e-3, float64: off by 1e-12 times a fifth derivative, and by
    rounding of 1e-16/1e-3; 1e-9 leaves both room."""
    probe, batch, v, stats, tangent, mask, sampler, moved = small
    ratio = sampler if off_policy else None
    b = of_prefix(batch, mask)
    first = estimators.first_order(
        stats,
        baselines.controlled_tangent(tangent, b, mask, entropy, ratio),
        mask,
        batch.prompt_N,
        entropy,
        ratio,
    )
    change = {}
    for eta in (-2e-3, -1e-3, 1e-3, 2e-3):
        there = baselines.controlled_stats(stats, moved(eta), b, mask, entropy, ratio)
        change[eta] = estimators.measured_change(stats, there, mask, entropy, ratio).delta
    slope = 8 * (change[1e-3] - change[-1e-3]) - (change[2e-3] - change[-2e-3])
    assert first.derivative == pytest.approx(slope / 12e-3, abs=1e-9)
    bare = estimators.first_order(stats, tangent, mask, batch.prompt_N, entropy, ratio)
    assert abs(first.derivative - bare.derivative) > 1e-5
    still = baselines.controlled_stats(stats, stats, b, mask, entropy, ratio)
    assert estimators.measured_change(stats, still, mask, entropy, ratio).delta == 0
    # The reverse route: X from the controlled coefficients, dotted with v.
    p, q = baselines.controlled_coefficients(
        estimators.gradient_coefficients(stats, mask, entropy, ratio), b, mask, entropy, ratio
    )
    X = probe.weighted_grad(probe.params, batch, p, q)
    assert tree.dot(X, v) == pytest.approx(first.derivative, rel=1e-9)
    assert float(first.per_sequence_N.sum()) == pytest.approx(first.derivative, rel=1e-9)


@each_controlled
def test_the_target_is_what_multiplies_the_score(small, entropy):
    """With b = Q nothing of the score is left, on or off policy; with b = 0 nothing changes."""
    _, batch, _, stats, tangent, mask, sampler, _ = small
    for ratio in (None, sampler):
        target = baselines.score_target(stats, mask, entropy, ratio)
        controlled = baselines.controlled_tangent(tangent, target, mask, entropy, ratio)
        left = estimators.first_order(stats, controlled, mask, batch.prompt_N, entropy, ratio)
        _, q = estimators.gradient_coefficients(stats, mask, entropy, ratio)
        assert left.derivative == pytest.approx(float((q * tangent.entropy_NR).sum()), rel=1e-10)
    none = baselines.baseline("none", batch, stats, mask, entropy)
    assert torch.equal(
        baselines.controlled_tangent(tangent, none, mask, entropy).entropy_NR, tangent.entropy_NR
    )


def test_target_per_decision_is_the_entropy_to_come(small):
    _, _, _, stats, _, mask, _, _ = small
    token, sequence = (
        baselines.score_target(stats, mask, Entropy(per, "rao_blackwell", "per_decision"))
        for per in ("token", "sequence")
    )
    rate = float(stats.entropy_NR[mask].mean())
    by_position = stats.entropy_NR.mean(0)  # ended responses count 0
    for i, j in mask.nonzero().tolist():
        later = stats.entropy_NR[i, j + 1 :][mask[i, j + 1 :]]
        assert float(token[i, j]) == pytest.approx(float((later - rate).sum()), abs=1e-12)
        want = float(later.sum() - by_position[j + 1 :].sum())
        assert float(sequence[i, j]) == pytest.approx(want, abs=1e-12)
    assert not token[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_knows_nothing_of_its_own_token_or_later(small, kind):
    """One sequence gets another ending: its baseline up to there stays, and so does its siblings'."""
    _, batch, _, stats, _, mask, _, _ = small
    entropy = Entropy("token", "rao_blackwell", "per_decision")
    i = 4
    cut = int(batch.response_length_N[i]) - 2
    assert cut >= 1
    tokens = batch.tokens_NL.clone()
    start = int(batch.prompt_length_N[i])
    tokens[i, start + cut :] = (tokens[i, start + cut :] + 1) % 11
    other_batch = batch._replace(tokens_NL=tokens)
    logp, h = stats.logp_NR.clone(), stats.entropy_NR.clone()
    logp[i, cut:] *= 1.7
    h[i, cut + 1 :] *= 0.4
    # R is an average of the whole batch: held, so that only the sequence's own part is seen.
    held = baselines.score_target(stats, mask, entropy)
    changed = held.clone()
    changed[i] += 3.0 * mask[i]
    same = batch.prompt_N == batch.prompt_N[i]
    make = {
        "none": lambda q, b, s: torch.zeros_like(q),
        "entropy": lambda q, b, s: s.entropy_NR * mask,
        "position": lambda q, b, s: baselines.position_mean(q, mask, b.prompt_N),
        "ridge": lambda q, b, s: regression.ridge(
            q, mask, b.prompt_N, regression.prefix_features(b, s, mask)
        ),
    }[kind]
    before = make(held, batch, stats)
    after = make(changed, other_batch, TokenStats(logp, h))
    assert torch.allclose(before[i, : cut + 1], after[i, : cut + 1], rtol=0, atol=1e-12)
    siblings = same.clone()
    siblings[i] = False
    assert torch.allclose(before[siblings], after[siblings], rtol=0, atol=1e-12)
    if kind in ("position", "ridge"):  # the others do learn of it
        assert float((before - after)[~same].abs().max()) > 1e-3


def test_position_mean_is_a_loop(small):
    batch, mask = small[1], small[5]
    q = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)).double() * mask
    seen = baselines.position_mean(q, mask, batch.prompt_N)
    for i, j in mask.nonzero().tolist():
        others = [
            float(q[k, j])
            for k in range(len(q))
            if mask[k, j] and batch.prompt_N[k] != batch.prompt_N[i]
        ]
        assert float(seen[i, j]) == pytest.approx(sum(others) / max(len(others), 1), abs=1e-12)
    alone = mask.clone()
    alone[1:, 3:] = False
    alone[0, :5] = True
    assert float(baselines.position_mean(q, alone, batch.prompt_N)[0, 4]) == 0


def test_ridge_finds_a_linear_target_and_shrinks_noise():
    """800 tokens of 40 units: b of a linear Q is Q to the smallest penalty; of noise, near 0."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(100, 8, dtype=torch.bool)
    x = torch.randn(100, 8, 3, generator=generator).double()
    unit = torch.arange(100) % 40
    beta = torch.tensor([1.0, -2.0, 0.5]).double()

    def features(index):
        return x[index].flatten(0, 1)

    linear = x @ beta
    assert float((regression.ridge(linear, mask, unit, features) - linear).abs().max()) < 0.02
    noise = torch.randn(100, 8, generator=generator).double()
    # 60 features of 640 tokens of noise: 0.3 without a penalty, 0.12 with the largest.
    many = torch.randn(100, 8, 60, generator=generator).double()
    assert float(regression.ridge(noise, mask, unit, lambda i: many[i].flatten(0, 1)).std()) < 0.2
    # A dense oracle, one penalty, one fold: units 0, 5, 10, ... against the rest, weighted.
    weight = torch.rand(100, 8, generator=generator).double()
    found = regression.ridge(linear + noise, mask, unit, features, weight)
    train = unit % 5 != 0
    A, w, y = x[train].flatten(0, 1), weight[train].flatten(), (linear + noise)[train].flatten()
    candidates = []
    for penalty in regression.PENALTIES:
        root = w.sqrt()[:, None]
        extra = math.sqrt(penalty * float(w.mean())) * torch.eye(3).double()
        solution = torch.linalg.lstsq(
            torch.cat([root * A, extra]), torch.cat([root[:, 0] * y, torch.zeros(3).double()])
        ).solution
        candidates.append(float((found[~train] - x[~train] @ solution).abs().max()))
    assert min(candidates) < 1e-10


def test_ridge_with_one_weight_everywhere_is_the_unweighted(small):
    _, batch, _, stats, _, mask, _, _ = small
    entropy = Entropy("sequence", "rao_blackwell", "per_decision")
    q = baselines.score_target(stats, mask, entropy)
    features = regression.prefix_features(batch, stats, mask)
    plain = regression.ridge(q, mask, batch.prompt_N, features)
    weighted = regression.ridge(q, mask, batch.prompt_N, features, torch.full_like(q, 7.0))
    assert torch.allclose(plain, weighted, rtol=0, atol=1e-10)


def test_features_of_long_responses_stay_few():
    """4,096 positions: 16 exact and 4 an octave, so that beta is solved in a moment."""
    places = regression._position_bin(torch.arange(4096))
    assert places[:17].tolist() == list(range(17))
    assert int(places.max()) == 16 + 4 * 8 - 1
    assert bool((places.diff() >= 0).all())


def test_buckets_hold_every_id_and_tell_digits_apart():
    ids = torch.arange(151_936)
    buckets = regression._bucket(ids, 64)
    counts = torch.bincount(buckets, minlength=64)
    assert len(counts) == 64
    assert 2300 < int(counts.min()) <= int(counts.max()) < 2450  # 2374 each
    assert len(regression._bucket(torch.arange(15, 25), 64).unique()) == 10


def test_unsuitable_estimators_are_refused(small):
    _, batch, _, stats, _, mask, _, _ = small
    with pytest.raises(InputError, match='integrand = "sampled" admits no baseline'):
        baselines.score_target(stats, mask, Entropy("token", "sampled", "per_decision"))
    with pytest.raises(InputError, match=r"clip = 2\.0: clipped importance weights"):
        baselines.score_target(stats, mask, Entropy(clip=2.0))
    two = torch.arange(30) % 2
    features = regression.prefix_features(batch, stats, mask)
    with pytest.raises(InputError, match="2 prompts"):
        regression.ridge(stats.entropy_NR, mask, two, features)


def test_ridge_keeps_its_size_under_a_far_sampler(small):
    """Ratios of e^-50 and less: Q, divided by them, is huge where it hardly enters, and must not lead.

    Unweighted, the derivative of this batch goes from -0.08 to 480.
    """
    _, batch, _, stats, tangent, mask, _, _ = small
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).double()
    sampler_logp = (-5 * noise.abs() - 0.1) * mask
    unit = torch.arange(len(mask))
    ridge, none = (
        funcprobe.derivative(
            funcprobe.evaluate(batch, stats, Entropy(baseline=kind), sampler_logp), tangent, unit
        )
        for kind in ("ridge", "none")
    )
    own = funcprobe.derivative(funcprobe.evaluate(batch, stats), tangent, unit)
    # A sequence or two carry it all, so that its own standard error is no yardstick; ten times the
    # spread of one sequence of the policy's own samples is (0.75, and the gap is 0.43).
    spread = math.sqrt(len(mask)) * own.se
    assert 0 < abs(ridge.derivative - none.derivative) < 10 * spread
