"""The verdict: what the step does, whether its sign is known, and which batches would tell."""

import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from funcprobe.adapters.results import Results, load
from funcprobe.adapters.results.needed import needed
from funcprobe.adapters.results.quantity import StudentInterval, student_interval
from funcprobe.adapters.results.verdict import effect_line, verdict_line, verdict_of
from funcprobe.statistics.intervals import Error, total


def fresh(results: Results, **entries: object) -> Results:
    """With other entries, and without the verdict as it was written."""
    return results.model_copy(update={"verdict": None, **entries})


def estimated(results: Results, derivative: float, se_E: float, se_U: float, masks=None) -> Results:
    """With another derivative and other errors, 60 and 15 degrees of freedom, 64 E and 16 prompts."""
    E, U = Error(se_E, 60.0), Error(se_U, 15.0)
    first = results.first_order
    update = {
        "derivative": first.derivative.model_copy(update={"value": derivative}),
        "se_given_U": first.se_given_U.model_copy(update={"value": se_E}),
        "se_over_U": first.se_over_U.model_copy(update={"value": se_U}),
        "interval_given_U": student_interval(derivative, E),
        "interval_over_U": student_interval(derivative, U),
        "interval_total": student_interval(derivative, total(E, U, *([masks] if masks else []))),
    }
    counts = results.counts.model_copy(
        update={"E_sequences": 64, "U_prompts": 16, "U_groups_without_gradient": 0}
    )
    lr = results.next_lr.model_copy(update={"value": 1e-3})
    entropy = results.entropy.model_copy(update={"value": 2.0})
    return fresh(
        results,
        first_order=first.model_copy(update=update),
        counts=counts,
        next_lr=lr,
        entropy=entropy,
        second_order=None,
        checks=(),
        sweep=(),
    )


@pytest.fixture(scope="module")
def results(run_one) -> Results:
    return load(run_one)


def test_the_run_writes_its_verdict(run_one, results):
    """Its numbers are those of the document, at the next step's learning rate."""
    verdict, first, eta = results.verdict, results.first_order, results.next_lr.value
    assert verdict is not None
    assert json.loads((run_one / "results.json").read_text())["verdict"]["eta"] == eta
    assert verdict == verdict_of(results) == verdict_of(fresh(results))
    (row,) = [row for row in results.sweep if row.is_next_lr]
    entropy = verdict.entropy
    assert (entropy.change, entropy.low, entropy.high) == pytest.approx(
        (row.predicted.value, row.interval_total.low, row.interval_total.high), rel=1e-12
    )
    assert verdict.relative == entropy.change / results.entropy.value
    assert (verdict.low, verdict.high) == (
        entropy.low / results.entropy.value,
        entropy.high / results.entropy.value,
    )
    assert verdict.established is (first.interval_total.low * first.interval_total.high > 0)
    parts = {"this batch": first.from_update, "momentum": first.from_momentum}
    for cause in (c for c in verdict.causes if c.name in parts):
        assert cause.change == eta * parts[cause.name].value
    observed = {one.name: one for one in results.observables}
    assert [effect.name for effect in verdict.observables] == [*observed] != []
    for effect in verdict.observables:
        (at,) = [row for row in observed[effect.name].sweep if row.is_next_lr]
        assert effect.change == pytest.approx(at.predicted.value, rel=1e-12)
        assert effect.high == pytest.approx(at.interval_given_U.high, rel=1e-12)


def test_the_line_states_change_interval_and_sign(results):
    falls = estimated(results, -70.0, 10.0, 12.0)
    assert verdict_line(falls).startswith("entropy -3.5 % per step (95 %: -5.1 to -1.9), it falls; ")
    rises = estimated(results, 70.0, 10.0, 12.0)
    assert ": +1.9 to +5.1), it rises; " in verdict_line(rises)
    open_ = estimated(results, -70.0, 10.0, 48.0)
    assert verdict_line(open_).startswith(
        "entropy -3.5 % per step (95 %: -8.7 to +1.7), sign not established: some "
    )
    assert not verdict_of(open_).established
    assert verdict_of(open_).needed.kind == "U"


def parts_of(results: Results, update: float, momentum: float, decay: float = 0.0) -> Results:
    first = results.first_order
    given = {"from_update": update, "from_momentum": momentum, "from_weight_decay": decay}
    values = {k: getattr(first, k).model_copy(update={"value": v}) for k, v in given.items()}
    return fresh(results, first_order=first.model_copy(update=values))


def test_causes_are_percentages_only_of_one_sign(results):
    base = estimated(results, -70.0, 10.0, 12.0)
    alike = parts_of(base, -41.0, -29.0, -0.01)
    assert verdict_line(alike).endswith("it falls; 59 % this batch, 41 % momentum")
    mixed = parts_of(base, 20.0, -90.0)
    assert verdict_line(mixed).endswith("it falls; momentum -4.5 %, this batch +1 %")
    assert [cause.fraction for cause in verdict_of(mixed).causes] == [None, None]


def test_without_a_learning_rate_the_change_is_per_unit_of_it(results):
    base = estimated(results, -70.0, 10.0, 12.0)
    unknown = fresh(base, next_lr=base.next_lr.model_copy(update={"value": 0.0}))
    verdict = verdict_of(unknown)
    assert (verdict.eta, verdict.relative, verdict.entropy.change) == (None, None, -70.0)
    line = verdict_line(unknown)
    assert line.startswith(
        "entropy -70 nats per token per unit of learning rate (95 %: -102 to -38), it falls"
    )
    assert " per step" not in line + effect_line(verdict.observables[0], verdict)


def test_an_entropy_of_0_has_no_relative_change(results):
    base = estimated(results, -70.0, 10.0, 12.0)
    zero = fresh(base, entropy=base.entropy.model_copy(update={"value": 0.0}))
    assert verdict_of(zero).relative is None
    assert verdict_line(zero).startswith(
        "do not rely on this (it predicts a negative entropy, which does not exist): "
        "entropy -0.070 nats per token from 0 (95 %: -0.102 to -0.038), it falls; "
    )


def test_what_speaks_against_the_prediction_stands_before_it(results):
    base = estimated(results, -70.0, 10.0, 12.0)
    assert not verdict_line(base).startswith("do not rely")
    failed = results.checks[0].model_copy(update={"passed": False, "advisory": False})
    broken = fresh(base, checks=(failed,))
    start = f"do not rely on this (sanity checks failed: {failed.name}): entropy -3.5 % per step"
    assert verdict_line(broken).startswith(start)
    hint = failed.model_copy(update={"advisory": True})
    assert verdict_of(fresh(base, checks=(hint,))).doubts == ()
    second = results.second_order
    near = second.linear_until.model_copy(update={"eta": 1e-5})
    beyond = fresh(base, second_order=second.model_copy(update={"linear_until": near}))
    assert "beyond the range of first order, eta = 1e-05" in verdict_line(beyond)
    far = second.linear_until.model_copy(update={"eta": 1.0})
    within = fresh(base, second_order=second.model_copy(update={"linear_until": far}))
    assert verdict_of(within).doubts == ()
    (row,) = [row for row in results.sweep if row.is_next_lr]
    sign = -1 if row.predicted.value > 0 else 1
    measured = row.measured.model_copy(update={"value": 2e-3 * sign})
    for near_0, speaks in ((1e-3, True), (-1e-3, False)):
        bounds = sorted((near_0 * sign, 3e-3 * sign))
        interval = StudentInterval(low=bounds[0], high=bounds[1], degrees_of_freedom=9.0)
        opposite = {"measured": measured, "measured_interval_given_U": interval, "rounding": False}
        found = verdict_of(fresh(base, sweep=(row.model_copy(update=opposite),)))
        assert ("the measured change has the opposite sign" in found.doubts) is speaks


def test_a_known_step_has_no_error_over_U(results):
    """U is the step's own batch: only E can be larger."""
    known = estimated(results, -70.0, 40.0, 0.0)
    assert verdict_of(known).entropy.over == "E"
    assert verdict_of(known).needed.kind == "E"
    assert "(95 % over E: " in verdict_line(known)
    assert " responses of E would tell; " in verdict_line(known)


def test_a_U_without_gradient_is_no_U_without_error(results):
    counts = results.counts.model_copy(update={"U_groups_without_gradient": 16, "U_prompts": 16})
    still = fresh(estimated(results, -70.0, 10.0, 0.0), counts=counts)
    assert verdict_line(still).endswith("; this U has no gradient, another may have one")


def test_another_rule_is_not_the_next_step(results):
    step = results.conventions.step.model_copy(update={"rule": "sgd"})
    other = results.conventions.model_copy(update={"step": step})
    assert verdict_of(fresh(results, conventions=other)).step == 'a step along v of rule "sgd"'
    assert verdict_of(results).step == "the next step"


@pytest.mark.parametrize(
    ("d", "se_E", "se_U", "kind", "says"),
    [
        (70.0, 10.0, 48.0, "U", " prompts of U would tell"),
        (70.0, 40.0, 10.0, "E", " responses of E would tell"),
        (70.0, 40.0, 40.0, "both", " responses of E would tell"),
        (
            70.0,
            200.0,
            150.0,
            "beyond",
            "a change of up to 28 % cannot be excluded: batches more than 10",
        ),
        (7.0, 40.0, 40.0, "no number", "indistinguishable from 0, a change of up to 6 % cannot be"),
    ],
)
def test_what_would_tell(results, d, se_E, se_U, kind, says):
    open_ = estimated(results, -d, se_E, se_U)
    assert verdict_of(open_).needed.kind == kind
    assert says in verdict_line(open_)


def bound(d: float, se_E: float, se_U: float, b_E: int, b_U: int) -> float:
    """|d| less t SE with scipy's t, for normal units: n_E = 64 with 63 dof, n_U = 16 with 15."""
    v_E, v_U = se_E**2 * 64 / b_E, se_U**2 * 16 / b_U
    dof = (v_E + v_U) ** 2 / (v_E**2 / (b_E - 1) + v_U**2 / (b_U - 1))
    return d - float(scipy_stats.t.ppf(0.975, dof)) * math.sqrt(v_E + v_U)


def test_the_number_is_the_smallest_that_reaches_the_bound():
    for d, se_E, se_U in ((70.0, 10.0, 48.0), (-70.0, 25.0, 40.0), (1e-5, 2e-6, 8e-6)):
        found = needed(d, Error(se_E, 63), 64, Error(se_U, 15), 16)
        assert found.kind == "U"
        assert bound(abs(d), se_E, se_U, 64, found.U_prompts) > 0
        assert bound(abs(d), se_E, se_U, 64, found.U_prompts - 1) <= 0
    found = needed(70.0, Error(40.0, 63), 64, Error(10.0, 15), 16)
    assert found.kind == "E"
    assert bound(70.0, 40.0, 10.0, found.E_responses, 16) > 0
    assert bound(70.0, 40.0, 10.0, found.E_responses - 1, 16) <= 0
    found = needed(70.0, Error(40.0, 63), 64, Error(40.0, 15), 16)
    assert found.kind == "both"
    assert found.E_responses == 4 * found.U_prompts
    assert bound(70.0, 40.0, 40.0, found.E_responses, found.U_prompts) > 0
    assert bound(70.0, 40.0, 40.0, found.E_responses - 4, found.U_prompts - 1) <= 0


def test_masks_that_no_batch_averages_out():
    masks = Error(40.0, 7)
    assert needed(70.0, Error(1.0, 63), 64, Error(1.0, 15), 16, masks).kind == "no number"
    assert needed(100.0, Error(1.0, 63), 64, Error(30.0, 15), 16, masks).kind == "U"
    assert needed(200.0, Error(1.0, 63), 64, Error(1.0, 15), 16, masks) is None


def test_nothing_is_needed_where_the_sign_is_known_or_nothing_changes():
    assert needed(70.0, Error(10.0, 63), 64, Error(12.0, 15), 16) is None
    assert needed(0.0, Error(10.0, 63), 64, Error(12.0, 15), 16) is None


@pytest.mark.parametrize(("d", "sd_E", "sd_U"), [(1.0, 2.0, 3.0), (-1.0, 8.0, 2.0), (1.0, 6.0, 3.0)])
def test_the_number_has_about_even_odds(d, sd_E, sd_U):
    """Normal units of known deviation: batches of the size named exclude 0 every second time."""
    E, U = Error(sd_E / 8, 63), Error(sd_U / 4, 15)
    found = needed(d, E, 64, U, 16)
    b_E, b_U = found.E_responses or 64, found.U_prompts or 16
    rng, times = np.random.default_rng(0), 20_000
    # The mean of b normal units, and their sample variance, which is independent of it.
    estimate = (
        d + rng.normal(0, sd_E / math.sqrt(b_E), times) + rng.normal(0, sd_U / math.sqrt(b_U), times)
    )
    v_E = sd_E**2 / b_E * rng.chisquare(b_E - 1, times) / (b_E - 1)
    v_U = sd_U**2 / b_U * rng.chisquare(b_U - 1, times) / (b_U - 1)
    dof = (v_E + v_U) ** 2 / (v_E**2 / (b_E - 1) + v_U**2 / (b_U - 1))
    half = scipy_stats.t.ppf(0.975, dof) * np.sqrt(v_E + v_U)
    assert 0.45 < (np.abs(estimate) > half).mean() < 0.6
    kinds = {"U": b_U > 16, "E": b_E > 64, "both": b_U > 16 and b_E > 64}
    assert kinds[found.kind]
