"""The table of the observables states what the numbers allow, and no more."""

import pytest
from rich.console import Console

from funcprobe.adapters.results import load
from funcprobe.adapters.results.observable_tables import table
from funcprobe.adapters.results.quantity import Quantity, StudentInterval
from funcprobe.adapters.results.verdict import effect_line, verdict_of


def at_next(results, name: str, value: float, half: float, **entries):
    """The results with another prediction of one observable at the next learning rate."""
    one = next(o for o in results.observables if o.name == name)
    interval = StudentInterval(low=value - half, high=value + half, degrees_of_freedom=9.0)
    predicted = Quantity(value=value, unit=one.at_theta.unit, normalised_by="over E")
    given = {"predicted": predicted, "interval_given_U": interval} | entries
    rows = tuple(r.model_copy(update=given) if r.is_next_lr else r for r in one.sweep)
    changed = one.model_copy(update={"sweep": rows})
    others = tuple(changed if o.name == name else o for o in results.observables)
    return results.model_copy(update={"observables": others})


def printed(results) -> str:
    console = Console(width=140, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(table(results))
    return captured.get()


@pytest.mark.parametrize(
    ("value", "half", "shown"),
    [
        (0.0041, 0.0062, "reward +0.0041 from 0.25 (95 %, U given: -0.0021 to +0.0103), sign not "),
        (-12.34, 3.21, "reward -12.3 from 0.25 (95 %, U given: -15.6 to -9.1), it falls"),
        (123.4, 45.6, "reward +123 from 0.25 (95 %, U given: +78 to +169), it rises"),
        (1e-9, 3.2e-9, "reward +1.0e-09 from 0.25 (95 %, U given: -2.2e-09 to +4.2e-09), sign not "),
        (0.0, 0.0, "reward +0.000 from 0.25, equal in all of E"),
    ],
)
def test_a_change_has_the_digits_of_its_interval(run_one, value, half, shown):
    verdict = verdict_of(load(run_one))
    effect = next(one for one in verdict.observables if one.name == "reward")
    given = {"change": value, "low": value - half, "high": value + half, "at_theta": 0.25}
    established = abs(value) > half
    changed = effect.model_copy(update=given | {"established": established, "needed": None})
    assert effect_line(changed, verdict).startswith(shown)


def test_what_is_rounding_or_without_weights_has_no_ratio(run_one):
    results = load(run_one)
    row = next(r for r in results.observables[0].sweep if r.is_next_lr)
    ratio = f"{row.ratio.value:.4f}"
    assert ratio in printed(results)
    for spoilt in ({"rounding": True}, {"measured_interval_given_U": None}):
        assert ratio not in printed(at_next(results, "reward", 1e-3, 1e-4, **spoilt))
    # Where its own rounding is not known, as of kl_base, the entropy's stands for it.
    unknown = at_next(results, "reward", 1e-3, 1e-4, rounding=None)
    assert ratio in printed(unknown)
    rows = tuple(r.model_copy(update={"rounding": True}) for r in results.sweep)
    assert ratio not in printed(unknown.model_copy(update={"sweep": rows}))


def test_the_row_is_of_the_largest_eta_that_the_weights_allow(run_one):
    results = load(run_one)
    assert "at eta = 0.001, the next lr (" in printed(results)
    rows = tuple(r.model_copy(update={"is_next_lr": False}) for r in results.sweep)
    assert "at eta = 0.001 (" in printed(results.model_copy(update={"sweep": rows}))
    worst = (*rows[:-1], rows[-1].model_copy(update={"verdict": "resample"}))
    assert f"at eta = {rows[-2].eta:g} (" in printed(results.model_copy(update={"sweep": worst}))


def test_a_name_is_no_markup(run_one):
    results = load(run_one)
    one = results.observables[0].model_copy(update={"name": "own.py:[red]x[/red]"})
    assert "[red]x[/red]" in printed(results.model_copy(update={"observables": (one,)}))


def test_without_observables_nothing_is_said(run_one):
    assert table(load(run_one).model_copy(update={"observables": ()})) is None
