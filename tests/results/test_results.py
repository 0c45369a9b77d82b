"""The fits of results.json on curves that are known, and on a run in float64."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import funcprobe
from funcprobe.adapters.results import document as results
from funcprobe.adapters.results import sweep as sweep_results
from funcprobe.adapters.stages import sweep
from funcprobe.statistics.estimators import Measured
from funcprobe.statistics.intervals import Error
from support.checkpoints import sets

ONE = torch.ones(1, dtype=torch.float64)


def fits(etas, curve, noise, derivative=3.0, bend=None):
    """`fits` of measured changes curve(eta)."""
    measured = (Measured(curve(eta), 10.0, 1.0, 0, ONE, ONE) for eta in etas)
    points = tuple(sweep.Point(eta, m, None, None) for eta, m in zip(etas, measured, strict=True))
    found = sweep.Sweep(points, noise, bend)
    return sweep_results.fits(SimpleNamespace(derivative=derivative), found, "nats per token")


def test_a_power_law_has_its_exponent():
    x = [1e-6, 1e-5, 1e-3, 1e-2]
    line = sweep_results.log_log(x, [-2 * eta**1.5 for eta in x])
    assert line.slope == pytest.approx(1.5, rel=1e-12)
    assert line.r_squared == pytest.approx(1, rel=1e-12)
    assert line.points == 4
    crooked = sweep_results.log_log([1, 10, 100], [1, 100, 1000])
    assert crooked.r_squared == pytest.approx(np.corrcoef([0, 1, 2], [0, 2, 3])[0, 1] ** 2)


@pytest.mark.parametrize("y", [[1, 2], [1, 0, 2], [5, 5, 5]])
def test_no_line_through_too_little(y):
    assert sweep_results.log_log([1.0, 2.0, 3.0][: len(y)], y) is None


def test_slopes_of_a_quadratic_curve():
    etas = (1e-6, 1e-5, 1e-4, 1e-3)
    found = fits(etas, lambda eta: 3 * eta + 7 * eta**2, noise=1e-18)
    assert found.measured_against_eta.slope == pytest.approx(1, abs=1e-3)
    assert found.deviation_against_eta.slope == pytest.approx(1, abs=1e-9)
    assert found.deviation_against_eta.points == 4
    assert found.rounding_eta.value == pytest.approx(1e-18 / 0.1 / 3, rel=1e-9, abs=0)


def test_rounding_keeps_rows_out_of_the_fits():
    """Noise 1e-9 is 10 % of 3 eta at eta = 3.3e-9, and of 7 eta^2 at eta = 3.8e-5."""
    etas = (1e-9, 1e-6, 2e-5, 1e-4, 1e-3, 1e-2)
    for bend in (7, -7):
        found = fits(etas, lambda eta, bend=bend: 3 * eta + bend * eta**2, noise=1e-9)
        assert found.measured_against_eta.points == 5
        assert found.deviation_against_eta.points == 3  # at 2e-5 it is 28 % of the deviation
    assert found.rounding_eta.value == pytest.approx(1e-9 / 0.1 / 3)
    assert fits(etas, lambda eta: 3 * eta, noise=None).rounding_eta is None


def test_the_second_derivative_ends_the_linear_range():
    """3 eta and 6 eta^2 / 2: a tenth at eta = 0.1, whatever the measured changes look like."""
    etas = (0.01, 0.02, 0.05, 0.099, 0.101, 0.2)
    for eta_high, bend in (
        (0.099, sweep.Curvature(6.0, Error(1.0, 5), None)),
        (0.099, sweep.Curvature(-6.0, Error(1.0, 5), 1e-3)),
        (0.2, sweep.Curvature(0.1, Error(1.0, 5), None)),
        (0.2, None),
    ):
        found = fits(etas, lambda eta: 3 * eta, noise=1e-18, bend=bend)
        assert found.linear.eta_high == eta_high
        points = 4 if eta_high == 0.099 else 6
        assert found.linear.points == found.measured_against_eta.points == points


def test_rounding_of_a_symmetric_difference_is_its_spread():
    """4000 draws: their standard deviation is good to 1.1 %."""
    noise, eta = 1e-9, 1e-3
    changes = noise * np.random.default_rng(0).standard_normal((4000, 2))
    spread = np.std([funcprobe.second_difference(*map(float, pair), eta) for pair in changes])
    found = sweep.Sweep((), noise, sweep.Curvature(6.0, Error(1.0, 5), eta))
    document = sweep_results.second_order(SimpleNamespace(derivative=3.0), found, "nats per token")
    assert document.rounding.value == pytest.approx(float(spread), rel=0.05)


def test_the_mean_reward_is_of_the_responses_that_have_one():
    nan = float("nan")
    assert results._mean_reward([1.0, nan, 3.0]).value == 2
    assert results._mean_reward([nan, nan]) is results._mean_reward(None) is None


@pytest.mark.slow
def test_the_bound_of_an_update_is_of_the_rule_precondition(checkpoint, command):
    Path("c.toml").touch()
    bound = 1e-3
    for rule in ("adamw", "precondition"):
        given = {"run.name": rule, "optimizer.rule": rule, "optimizer.max_update": bound}
        assert command("run", "c.toml", *sets(checkpoint.settings() | given)).status == 0
        v = load_file(f"runs/{rule}/direction.safetensors")
        largest = max(float(t.abs().max()) for t in v.values())
        assert (largest <= bound * (1 + 1e-6)) == (rule == "precondition")  # stored in float32


def test_first_order_is_the_limit_over_four_decades(checkpoint, command):
    """|ratio - 1| falls in proportion to eta and is under 1e-3 at the smallest."""
    Path("c.toml").touch()
    given = checkpoint.settings() | {"measure.etas": [1e-8, 1e-7, 1e-6, 1e-5, 1e-4]}
    for weights in ("per_decision", "sequence"):
        name = {"run.name": weights, "entropy.weights": weights, "measure.next_lr": False}
        assert command("run", "c.toml", *sets(given | name)).status == 0
        document = json.loads(Path(f"runs/{weights}/results.json").read_text())
        rows = document["sweep"]
        gaps = [abs(row["ratio"]["value"] - 1) for row in rows]
        assert gaps[0] < 1e-3
        for small, large in itertools.pairwise(gaps):
            # Ten, but for the cubic term (1e-4 of a random policy: some percent) and rounding.
            assert large / small == pytest.approx(10, rel=0.1)
        # Measured - predicted is quadratic sequence by sequence, so its error is, too.
        shares = [row["difference_se"]["value"] / row["se_given_U"]["value"] for row in rows]
        for small, large in itertools.pairwise(shares):
            assert large / small == pytest.approx(10, rel=0.1)
        fit = document["fit"]
        # At eta = 1e-4 the ratio is some percent off 1, which tilts the line by as much a decade.
        assert fit["measured_against_eta"]["slope"] == pytest.approx(1, abs=0.02)
        assert fit["measured_against_eta"]["r_squared"] > 0.999
        assert fit["deviation_against_eta"]["slope"] == pytest.approx(1, abs=0.02)
        assert fit["rounding_eta"]["value"] < 1e-12


@pytest.mark.slow
def test_rounding_takes_over_in_float32_far_earlier(checkpoint, command):
    Path("c.toml").touch()
    floor = {}
    for dtype in ("float64", "float32"):
        given = checkpoint.settings() | {"run.name": dtype, "policy.dtype": dtype}
        assert command("run", "c.toml", *sets(given)).status == 0
        document = json.loads(Path(f"runs/{dtype}/results.json").read_text())
        floor[dtype] = document["fit"]["rounding_eta"]["value"]
    # The units in the last place differ by 5e8; a factor of 100 is left to chance.
    assert 5e6 < floor["float32"] / floor["float64"] < 5e10
