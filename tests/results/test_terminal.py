"""The printed end of a run fits on a screen, 30 lines of 80 columns, whatever the run found."""

import io
import itertools
import re
from pathlib import Path

import pytest
from rich.console import Console

from funcprobe.adapters.results import Results, load
from funcprobe.adapters.results.digits import with_half
from funcprobe.adapters.results.fitted import fitted
from funcprobe.adapters.results.quantity import Interval
from funcprobe.adapters.results.tables import print_results

LINES, COLUMNS = 30, 80
WROTE = 1  # line of stderr after it: where the run folder is
LONG = "'" + "What is the sum of seventeen and twenty-five? " * 3 + "'"


def printed(results: Results, columns: int = COLUMNS, *, verbose: bool = False) -> str:
    """As a terminal of so many columns shows it: what is longer would be wrapped, and counts so."""
    out = io.StringIO()
    console = Console(file=out, width=columns, force_terminal=False, highlight=False)
    print_results(results, console, verbose=verbose, report=Path("runs/one/report.html"))
    return out.getvalue()


def wide_as(line: str) -> int:
    console = Console(width=10_000)
    return console.measure(line).maximum if line else 0


def require_fits(text: str, columns: int = COLUMNS, lines: int = LINES) -> None:
    shown = text.splitlines()
    assert max(map(wide_as, (line.rstrip() for line in shown))) <= columns
    assert "…" not in text  # what a table cuts off
    assert len(shown) <= lines - WROTE


def many_etas(results: Results) -> Results:
    """Twenty learning rates, of which the 13th is the next step's."""
    row = next(row for row in results.sweep if row.is_next_lr)
    rows = tuple(
        row.model_copy(update={"eta": 10.0 ** (i / 2 - 9), "is_next_lr": i == 12}) for i in range(20)
    )
    return results.model_copy(update={"sweep": rows})


def worst_weights(results: Results) -> Results:
    rows = tuple(
        row.model_copy(
            update={"verdict": "resample", "measured_interval_given_U": None, "rounding": False}
        )
        for row in results.sweep
    )
    return results.model_copy(update={"sweep": rows})


def failing(results: Results) -> Results:
    long = {"passed": False, "advisory": False, "saw": "found " * 30, "failure_means": "cause " * 30}
    checks = tuple(one.model_copy(update=long) for one in results.checks)
    return results.model_copy(update={"checks": checks, "verdict": None})


def many_observables(results: Results) -> Results:
    (one, *_) = results.observables
    names = (f"own.py:a_function_of_ones_own_{i}" for i in range(12))
    observed = tuple(one.model_copy(update={"name": name}) for name in names)
    return results.model_copy(update={"observables": observed, "verdict": None})


def long_texts(results: Results) -> Results:
    section = results.attribution
    prompts = tuple(one.model_copy(update={"text": LONG}) for one in section.U_prompts)
    return results.model_copy(
        update={
            "attribution": section.model_copy(update={"U_prompts": prompts}),
            "unlike_the_run": ("the sidecar has a setting that this step does not have, " * 4,) * 3,
        }
    )


def eastern_texts(results: Results) -> Results:
    section = results.attribution
    prompts = tuple(
        one.model_copy(update={"text": "'" + "加法" * 30 + "'"}) for one in section.U_prompts
    )
    return results.model_copy(update={"attribution": section.model_copy(update={"U_prompts": prompts})})


CHANGES = {
    f.__name__: f
    for f in (many_etas, worst_weights, failing, many_observables, long_texts, eastern_texts)
}


@pytest.fixture(scope="module")
def results(run_one) -> Results:
    return load(run_one)


@pytest.mark.parametrize("names", [(), *itertools.combinations(CHANGES, 1), tuple(CHANGES)])
@pytest.mark.parametrize("columns", [80, 120, 200])
def test_at_most_thirty_lines_of_the_terminals_width(results, names, columns):
    for name in names:
        results = CHANGES[name](results)
    text = printed(results, columns)
    require_fits(text, columns)
    assert text.startswith("The next step (lr 0.001), from ")
    assert "  entropy " in text
    assert "sanity checks: " in text
    assert "report: runs/one/report.html; more numbers with -v" in text


def test_the_measure_of_the_test_counts_what_wraps():
    with pytest.raises(AssertionError):
        require_fits("x" * 81)
    with pytest.raises(AssertionError):
        require_fits("加" * 41)
    with pytest.raises(AssertionError):
        require_fits("x\n" * 30)


def rows_of(text: str) -> list[str]:
    rule = next(i for i, line in enumerate(text.splitlines()) if line.startswith("──"))
    lines = text.splitlines()[rule + 1 :]
    return list(itertools.takewhile(lambda x: x.startswith((" ", "next lr ")), lines))


def test_the_next_learning_rate_is_the_first_row(results):
    many = many_etas(results)
    rows = rows_of(printed(many))
    assert rows[0].startswith("next lr 0.001 ")
    assert [row for row in rows[1:] if "next lr" in row] == []
    assert "more with -v" in printed(many)
    assert len(rows) < 20
    etas = [float(row.split()[0]) for row in rows[1:]]
    assert (etas[0], etas[-1]) == (1e-9, pytest.approx(10**0.5, rel=1e-2))
    assert etas == sorted(etas)
    every = rows_of(printed(many, 120, verbose=True))
    assert len(every) == 20
    assert every[0].startswith("next lr 0.001 ")


def test_the_numbers_of_a_row_are_the_runs(results):
    row = next(row for row in results.sweep if row.is_next_lr)
    (line, *_) = rows_of(printed(results))
    found = re.findall(r"\(([+-][\d.]+) ± ([\d.]+)\)e([+-]\d+)", line)
    pairs = [(row.predicted, row.interval_total), (row.measured, row.measured_interval_given_U)]
    for (value, half, power), (number, interval) in zip(found, pairs, strict=True):
        assert float(value) * 10 ** int(power) == pytest.approx(
            number.value, abs=0.05 * interval.half_width
        )
        assert float(half) * 10 ** int(power) == pytest.approx(interval.half_width, rel=0.05)
    assert f" {row.ratio.value:.4f} " in line
    assert line.rstrip().endswith(row.verdict)


def test_what_the_weights_or_rounding_spoil_is_not_shown(results):
    for line in rows_of(printed(worst_weights(results))):
        assert line.split()[-3:] == ["-", "-", "resample"]
    assert "--set measure.resample=true" in printed(worst_weights(results))
    rows = tuple(row.model_copy(update={"rounding": True}) for row in results.sweep)
    for line in rows_of(printed(results.model_copy(update={"sweep": rows}))):
        assert line.split()[-3:] == ["-", "-", "rounding"]


def test_failed_checks_are_named_and_the_others_counted(results):
    text = printed(results)
    assert f"sanity checks: {len(results.checks)} of {len(results.checks)} passed\n" in text
    assert results.checks[0].name not in text
    one = results.checks[0].model_copy(update={"passed": False, "advisory": False})
    broken = results.model_copy(update={"checks": (one, *results.checks[1:]), "verdict": None})
    text = " ".join(printed(broken).split())
    assert f"FAIL: {one.name}: found {one.saw}" in text
    said = f"to first order: do not rely on this (sanity checks failed: {one.name}"
    assert said in text
    assert f"{len(results.checks) - 2} more did not: -v" in printed(failing(results))


def test_details_have_everything(results):
    text = " ".join(printed(results, 120, verbose=True).split())
    for words in ("Derivative along v: ", "Its parts: ", "numerical floor: ", "cost: ", "2nd order"):
        assert words in text
        assert words not in printed(results, 120)
    for check in results.checks:
        assert check.name.split()[0] in text


def test_nothing_in_a_text_is_markup(results):
    section = results.attribution
    prompts = tuple(one.model_copy(update={"text": "'[red]x[/red]'"}) for one in section.U_prompts)
    hostile = results.model_copy(
        update={"attribution": section.model_copy(update={"U_prompts": prompts})}
    )
    for verbose in (False, True):
        assert "'[red]x[/red]'" in printed(hostile, 120, verbose=verbose)


@pytest.mark.parametrize(
    ("value", "half", "shown"),
    [
        (-5.63e-2, 2.53e-2, "(-5.6 ± 2.5)e-02"),
        (-1.107e-3, 3.8e-4, "(-1.11 ± 0.38)e-03"),
        (1e-9, 3.24e-8, "(+0.1 ± 3.2)e-08"),
        (13.34, 0.68, "(+1.334 ± 0.068)e+01"),
        (0.0, 0.0, "0"),
    ],
)
def test_a_number_and_its_error_share_a_power_of_ten(value, half, shown):
    assert with_half(value, Interval(low=value - half, high=value + half)) == shown


def test_prose_is_broken_at_words_below_its_label():
    console = Console(width=20)
    lines = [str(line) for line in fitted("one two three four five six", console, label="  a ")]
    assert lines == ["  a one two three", "    four five six"]
    assert [str(x) for x in fitted("one two three four five six", console, most=1)] == [
        "one two three  ..."
    ]
    (line, *_) = fitted("[b]x[/b] :smile:", console)
    assert str(line) == "[b]x[/b] :smile:"
