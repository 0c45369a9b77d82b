"""What is printed after a run: the finding in words states what the numbers allow, and no more."""

import pytest

from funcprobe.adapters.results import Results, load
from funcprobe.adapters.results.attribution_words import causes
from funcprobe.adapters.results.quantity import Quantity, StudentInterval
from funcprobe.adapters.results.tables import in_words


def changed(results: Results, **entries) -> Results:
    """The same results with entries of the next step's row replaced."""
    row = next(row for row in results.sweep if row.is_next_lr)
    return results.model_copy(update={"sweep": (row.model_copy(update=entries),)})


def change(value: float, half: float) -> dict[str, object]:
    """A prediction with its interval."""
    interval = StudentInterval(low=value - half, high=value + half, degrees_of_freedom=9.0)
    predicted = Quantity(value=value, unit="nats per token", normalised_by="over E")
    return {"predicted": predicted, "interval_total": interval}


@pytest.mark.parametrize(
    ("value", "half", "effect"),
    [
        (-2e-3, 1e-3, "lower the entropy"),
        (2e-3, 1e-3, "raise the entropy"),
        (2e-3, 3e-3, "change the entropy by an amount that is indistinguishable from 0"),
        (-2e-3, 3e-3, "change the entropy by an amount that is indistinguishable from 0"),
    ],
)
def test_the_effect_is_stated_where_the_interval_excludes_0(run_one, value, half, effect):
    results = changed(load(run_one), **change(value, half))
    line = in_words(results)[0]
    assert line.startswith(f"The next step (lr 0.001) is predicted to {effect}: from ")
    share = f"({value / results.entropy.value:+.2%})"
    assert f"predicted change {value:+.2e} ± {half:.1e} over E and U {share}, measured " in line


def test_a_measured_change_comes_with_what_spoils_it(run_one):
    results = load(run_one)
    measured = next(row for row in results.sweep if row.is_next_lr).measured.value
    plain = in_words(results)[0]
    assert f", measured {measured:+.2e} ± " in plain
    assert plain.endswith(" over E")
    assert in_words(changed(results, rounding=True))[0].endswith(f"measured {measured:+.2e} (rounding)")
    spoilt = changed(results, verdict="resample", measured_interval_given_U=None)
    assert in_words(spoilt)[0].endswith(f"measured {measured:+.2e} (not reliable: see its weights)")


DOUBT = "Do not rely on this prediction: "


def test_what_speaks_against_the_prediction_stands_beside_it(run_one):
    results = load(run_one)
    far = results.second_order.model_copy(
        update={"linear_until": results.second_order.linear_until.model_copy(update={"eta": 1.0})}
    )
    results = changed(results.model_copy(update={"second_order": far}), **change(-2e-3, 1e-3))
    assert not in_words(results)[1].startswith(DOUBT)

    failed = results.checks[0].model_copy(update={"passed": False, "advisory": False})
    broken = results.model_copy(update={"checks": (failed,)})
    assert in_words(broken)[1] == f"{DOUBT}sanity checks failed ({failed.name})"
    advisory = failed.model_copy(update={"advisory": True})
    assert not in_words(results.model_copy(update={"checks": (advisory,)}))[1].startswith(DOUBT)

    near = far.model_copy(update={"linear_until": far.linear_until.model_copy(update={"eta": 1e-5})})
    beyond = results.model_copy(update={"second_order": near})
    assert in_words(beyond)[1] == (
        f"{DOUBT}the learning rate is beyond the range of first order (eta = 1e-05)"
    )

    measured = Quantity(value=2e-3, unit="nats per token", normalised_by="over E")
    for low, speaks in ((1e-3, True), (-1e-3, False)):
        interval = StudentInterval(low=low, high=3e-3, degrees_of_freedom=9.0)
        row = {"measured": measured, "measured_interval_given_U": interval, "rounding": False}
        line = in_words(changed(results, **change(-2e-3, 1e-3), **row))[1]
        assert line.startswith(DOUBT) is speaks
        assert ("opposite sign" in line) is speaks


def test_the_parts_are_those_of_the_derivative(run_one):
    results = load(run_one)
    first = results.first_order
    assert in_words(results)[-1] == (
        f"Its parts: update {first.from_update.value:+.3e} ± {first.interval_over_U.half_width:.1e} "
        f"over U, momentum {first.from_momentum.value:+.3e}, "
        f"weight decay {first.from_weight_decay.value:+.3e}"
    )
    without = results.model_copy(update={"sweep": results.sweep[:1]})
    about_v = [*causes(results), *in_words(results)[-2:]]  # nothing about a step of unknown size
    assert in_words(without) == about_v


def test_who_makes_the_change_stands_right_after_it(run_one):
    results = load(run_one)
    finding, doubt, who, *_ = in_words(results)
    assert finding.startswith("The next step")
    assert doubt.startswith(DOUBT)
    assert who == causes(results)[0]
