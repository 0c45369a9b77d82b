"""What is printed after a run: the finding in words states what the numbers allow, and no more."""

import pytest

from funcprobe.adapters.results import Results, load
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
        (-2e-3, 1e-3, "lowers the entropy"),
        (2e-3, 1e-3, "raises the entropy"),
        (2e-3, 3e-3, "changes the entropy by an amount that is indistinguishable from 0"),
        (-2e-3, 3e-3, "changes the entropy by an amount that is indistinguishable from 0"),
    ],
)
def test_the_effect_is_stated_where_the_interval_excludes_0(run_one, value, half, effect):
    results = changed(load(run_one), **change(value, half))
    line = in_words(results)[0]
    assert line.startswith(f"The next step (lr 0.001) {effect}: from ")
    assert f"predicted change {value:+.2e} ± {half:.1e} ({value / results.entropy.value:+.2%})" in line


def test_a_measured_change_comes_with_what_spoils_it(run_one):
    results = load(run_one)
    measured = next(row for row in results.sweep if row.is_next_lr).measured.value
    plain = in_words(results)[0]
    assert f", measured {measured:+.2e} ± " in plain
    assert in_words(changed(results, rounding=True))[0].endswith(f"measured {measured:+.2e} (rounding)")
    spoilt = changed(results, verdict="resample", measured_interval_given_U=None)
    assert in_words(spoilt)[0].endswith(f"measured {measured:+.2e} (not reliable: see its weights)")


def test_the_parts_are_those_of_the_derivative(run_one):
    results = load(run_one)
    first = results.first_order
    assert in_words(results)[-1] == (
        f"Its parts: update {first.from_update.value:+.3e}, momentum {first.from_momentum.value:+.3e}, "
        f"weight decay {first.from_weight_decay.value:+.3e}"
    )
    without = results.model_copy(update={"sweep": results.sweep[:1]})
    assert len(in_words(without)) == len(in_words(results)) - 1  # nothing about a step of unknown size
