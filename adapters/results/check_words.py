"""The sanity checks as they are printed: a count, those that failed, or a table of all."""

from collections.abc import Iterable
from typing import Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .fitted import fitted


class Checked(Protocol):
    """A sanity check with its outcome: `funcprobe.checks.Check`, or as results.json holds it."""

    @property
    def name(self) -> str: ...
    @property
    def passed(self) -> bool: ...
    @property
    def saw(self) -> str: ...
    @property
    def bound(self) -> str: ...
    @property
    def failure_means(self) -> str: ...
    @property
    def advisory(self) -> bool: ...


def check_lines(checks: Iterable[Checked]) -> list[str]:
    """How many checks passed, then each one that did not, with its usual cause."""
    checks = list(checks)
    passed = sum(one.passed for one in checks)
    return [
        f"sanity checks: {passed} of {len(checks)} passed",
        *(
            f"{outcome(one)}: {one.name}: found {one.saw}, required {one.bound}; "
            f"usual cause: {one.failure_means}"
            for one in sorted(checks, key=lambda one: one.advisory)
            if not one.passed
        ),
    ]


def print_checks(checks: Iterable[Checked], console: Console, *, verbose: bool = False) -> None:
    """The count and the failed checks; with `verbose` a table of all of them before."""
    checks = list(checks)
    if verbose:
        table = Table(title="Sanity checks", title_justify="left")
        for column in ("", "check", "found", "required"):
            table.add_column(column)
        for one in checks:
            table.add_row(*map(Text, (outcome(one), one.name, one.saw, one.bound)))
        console.print(table)
    for line in check_lines(checks):
        for part in fitted(line, console):
            console.print(part)


def outcome(one: Checked) -> str:
    """pass, FAIL, or suspect where a check is advisory."""
    return "pass" if one.passed else "suspect" if one.advisory else "FAIL"
