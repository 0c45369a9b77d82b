"""Weights of known tails and known effective sample size, and what the verdict promises of them."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from funcprobe.adapters.stages.weight_diagnostics import verdict
from funcprobe.types import InputError


def of(weights, clipped=0):
    return verdict(torch.as_tensor(np.asarray(weights), dtype=torch.float64), clipped)


def quantiles(distribution, N):
    """A sample without sampling noise."""
    return distribution.ppf((np.arange(N) + 0.5) / N)


def heavy(k, scale, N=2048):
    return 1 + scale * quantiles(stats.genpareto(k), N)


@pytest.mark.parametrize("k", [0.2, 0.6, 0.9])
@pytest.mark.parametrize(("N", "tail"), [(200, 40), (2048, 135)])
def test_k_is_the_tails(k, N, tail):
    """Above any threshold a generalized Pareto distribution is one of the same k.

    The fit's prior counts as 10 draws of k = 0.5 (Vehtari et al. 2024, appendix G); the estimate's
    standard error is (1 + k) / sqrt(tail).
    """
    rng, repeats = np.random.default_rng(0), 60
    found = [of(1 + stats.genpareto.rvs(k, size=N, random_state=rng)).pareto_k for _ in range(repeats)]
    expected = (tail * k + 10 * 0.5) / (tail + 10)
    se = (1 + k) / math.sqrt(tail) * tail / (tail + 10)
    # The fit's own bias at 40 draws is 0.03.
    assert np.mean(found) == pytest.approx(expected, abs=4 * se / math.sqrt(repeats) + 0.03)
    assert np.std(found) == pytest.approx(se, rel=0.5)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.6])
def test_effective_sample_size_of_a_lognormal(sigma):
    """E[w]^2 / E[w^2] = exp(-sigma^2); the largest of N is exp(sigma z_N - sigma^2 / 2) means."""
    N = 200_000
    w = np.exp(sigma * quantiles(stats.norm, N))
    found = of(w)
    # Quantiles miss what lies beyond the last one: below 1e-3 of E[w^2] here.
    assert found.ess == pytest.approx(N * math.exp(-(sigma**2)), rel=1e-3)
    largest = math.exp(sigma * stats.norm.ppf(1 - 0.5 / N) - sigma**2 / 2)
    assert found.max_weight == pytest.approx(largest, rel=1e-3)


UNIFORM = np.linspace(-1, 1, 200)
CASES = {
    "all one": (np.ones(50), 0, "trust", "nearly equal"),
    "rounding": (1 + 1e-15 * np.arange(2048.0), 0, "trust", "nearly equal"),
    "tiny eta, few": (1 + 0.01 * UNIFORM[:8], 0, "trust", "nearly equal"),
    "tiny eta, heavy": (heavy(0.9, 1e-4), 0, "trust", "nearly equal"),
    "light tail": (1 + 0.4 * UNIFORM, 0, "trust", "no heavy tail"),
    "spread": (1 + 0.9 * UNIFORM, 0, "caution", "only"),
    "heavy, most effective": (heavy(0.9, 0.005), 0, "caution", "over 0.50"),
    "no variance": (heavy(0.6, 0.1), 0, "caution", "over 0.50"),
    "no variance, few": (heavy(0.45, 0.1, 64), 0, "caution", "over 0.45"),
    "heavy": (heavy(0.9, 0.03), 0, "resample", "over 0.70"),
    "heavy, many": (heavy(0.74, 0.03, 10_000), 0, "resample", "over 0.70"),
    "heavy, few": (heavy(0.9, 0.5, 64), 0, "resample", "over 0.50"),
    "lognormal": (np.exp(2 * quantiles(stats.norm, 2048)), 0, "resample", "only"),
    "one giant": (np.append(np.ones(99), 1e3), 0, "resample", "largest weight is 91"),
    "nine": (1 + 0.4 * UNIFORM[::25], 0, "resample", "only"),
    "two values": (np.repeat([0.5, 1.5], 50), 0, "caution", "without a tail"),
    "too few for a tail": (
        1 + 0.5 * UNIFORM[::10],
        0,
        "caution",
        "too few to fit a tail, 25 are needed",
    ),
    "clipped": (1 + 0.4 * UNIFORM, 1, "caution", "1 of 200 weights are clipped"),
    "clipped, equal": (np.ones(200), 40, "caution", "biases"),
    "clipped, many": (np.ones(2048), 136, "resample", "136 of 2048"),
    "clipped away": (np.ones(200), 41, "resample", "41 of 200 weights are clipped"),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name):
    weights, clipped, expected, reason = CASES[name]
    found = of(weights, clipped)
    assert (found.verdict, found.clip_fraction) == (expected, clipped / len(weights))
    assert reason in found.reason
    assert "\n" not in found.reason
    undefined = clipped or any(word in reason for word in ("equal", "without a tail", "too few"))
    few = len(weights) < 25 or name == "one giant"
    assert (found.pareto_k is None) == bool(undefined or few)


def test_the_fit_begins_with_25_weights():
    w = 1 + 0.5 * np.linspace(-1, 1, 25)
    assert of(w).pareto_k is not None
    assert of(w[1:]).pareto_k is None


def test_only_the_tail_has_a_say():
    """3 sqrt(2048) = 135 weights and the one below them."""
    w = heavy(0.4, 0.2)
    k = of(w).pareto_k
    below, within = w.copy(), w.copy()
    below[:-136] *= 0.5
    within[-136:-134] *= 0.97
    assert of(below).pareto_k == pytest.approx(k, rel=1e-9)
    assert abs(of(within).pareto_k - k) > 1e-4


@pytest.mark.parametrize(("ties", "defined"), [(4, True), (5, False)])
def test_the_tails_lower_quartile_must_stand_out(ties, defined):
    """Of 20: at 5 of them equal to the largest weight below, the fit would divide by 0."""
    w = np.concatenate([np.ones(80), np.ones(ties), 1 + np.linspace(0.1, 3, 20 - ties)])
    assert (of(w).pareto_k is not None) == defined


def test_weights_may_be_as_large_as_floats_are():
    assert of(np.full(30, 1.7e308)).ess == pytest.approx(30, rel=1e-12)


def test_the_threshold_follows_the_number_of_weights():
    """1 - 1/log10(N): the least k of a caution at 64 draws passes at 2048."""
    assert of(heavy(0.45, 0.08, 64)).verdict == "caution"
    assert of(heavy(0.45, 0.08, 2048)).verdict == "trust"


positive = st.floats(1e-3, 1e3) | st.sampled_from([1.0, 2.0, 0.0])


@given(st.lists(positive, min_size=2, max_size=120).filter(any), st.integers(-900, 900))
def test_only_ratios_matter(weights, power):
    """Powers of two scale exactly, here up to where the plain sum of squares overflows."""
    w = np.array(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = of(w)
        assert found == of(w * 2.0**power)
        again = of(w[::-1].copy())
    assert 1 - 1e-12 < found.ess < len(w) * (1 + 1e-12)
    assert again.ess == pytest.approx(found.ess, rel=1e-12)
    if found.pareto_k is not None:
        # Where the lower quartile of the tail is next to nothing, k is a log of its rounding.
        assert again.pareto_k == pytest.approx(found.pareto_k, rel=1e-3)


def test_trusted_intervals_cover():
    """Log-weights eta * a with a exponential: from eta = 0.5 on the weights have no variance.

    The change of E[z] with z = a is 1/(1 - eta) - 1 exactly. Intervals at N = 512 miss 5 % at best,
    and some more because a is skewed; those of the changes that are not trusted miss often.
    """
    rng, N = np.random.default_rng(3), 512
    covered = {"trust": [], "other": []}
    for eta in (0.001, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        for _ in range(100):
            a = rng.exponential(size=N)
            w = np.exp(eta * a)
            moved = (w * a).sum() / w.sum()
            influence = w * (a - moved) / w.sum() - (a - a.mean()) / N
            se = math.sqrt(np.square(influence).sum())
            within = abs(moved - a.mean() - (1 / (1 - eta) - 1)) < 1.96 * se
            covered["trust" if of(w).verdict == "trust" else "other"].append(within)
    # Standard errors of the two shares are below 0.02.
    assert len(covered["trust"]) > 250
    assert np.mean(covered["trust"]) > 0.88
    assert np.mean(covered["other"]) < 0.8


@pytest.mark.parametrize(
    ("weights", "clipped", "message"),
    [
        ([1.0], 0, "at least two"),
        ([[1.0, 2.0]], 0, "shape"),
        ([1.0, -1.0], 0, "between -1 and 1"),
        ([1.0, math.inf], 0, "inf"),
        ([1.0, math.nan], 0, "nan"),
        ([0.0, 0.0], 0, "not all 0"),
        ([1.0, 2.0], 3, "clipped = 3, a count of the 2"),
        ([1.0, 2.0], -1, "clipped = -1, a count of the 2"),
    ],
)
def test_refused(weights, clipped, message):
    with pytest.raises(InputError, match=message):
        of(weights, clipped)
