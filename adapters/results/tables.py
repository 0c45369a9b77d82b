"""What is printed at the end of a run: at most 30 lines of 80 columns, or with all details."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from . import observable_tables
from .attribution_words import beyond_shares, causes, largest_causes
from .check_words import check_lines, print_checks
from .cost import cost_line
from .details import about_v, under_the_table
from .fitted import fitted
from .influence_words import influence_lines
from .momentum import momentum_lines
from .schema import Results
from .sweep_table import TABLE_HEAD, sweep_table
from .verdict import doubts_line, effect_line, entropy_line, verdict_of

LINES = 29  # of 80 columns; one more says where the run folder is
NAME = 16  # columns of a quantity's name


class Room(NamedTuple):
    """Lines of each part, at most."""

    causes: int
    rows: int
    observables: int
    clause: int  # of an observable
    failed: int  # of a check that failed


ROOMS = (
    Room(6, 7, 6, 2, 3),
    Room(5, 6, 5, 1, 2),
    Room(3, 5, 3, 1, 2),
    Room(2, 4, 2, 1, 1),
)


def print_results(
    results: Results, console: Console, *, verbose: bool = False, report: Path | None = None
) -> None:
    """The verdict, the sweep, the causes, the checks that failed, and where the report lies.

    At most 29 lines at 80 columns; with `verbose` everything that the run found.
    """
    more = [] if verbose else ["more numbers with -v"]
    parts = [*([f"report: {report}"] if report else []), *more]
    last = fitted("; ".join(parts), console, most=2) if parts else []
    if verbose:
        _print(headline(results, console), console)
        console.print(sweep_table(results, width=console.width, verbose=True))
        _details(results, console)
    else:
        for room in ROOMS:
            head = headline(results, console, room)
            table = sweep_table(results, width=console.width, most=room.rows)
            under = _under(results, console, room)
            if len(head) + table.row_count + TABLE_HEAD + len(under) + len(last) <= LINES:
                break
        _print(head, console)
        console.print(table)
        _print(under, console)
    _print(last, console)


def headline(results: Results, console: Console, room: Room | None = None) -> list[Text]:
    """The step, then a clause for the entropy and for the observables that there is room for."""
    verdict = verdict_of(results)
    at = "learning rate not known" if verdict.eta is None else f"lr {verdict.eta:.3g}"
    step = verdict.step[0].upper() + verdict.step[1:]
    entropy, unit = verdict.entropy.at_theta, results.entropy.unit
    lines = fitted(f"{step} ({at}), from {entropy:.4g} {unit}, to first order:", console, most=2)
    shown = verdict.observables[: room.observables] if room else verdict.observables
    wide = min(NAME, max(len(one.name) for one in (verdict.entropy, *shown)))

    def clause(name: str, line: str, most: int | None) -> list[Text]:
        label = f"  {name[:NAME]:<{wide}} "
        return fitted(line.removeprefix(f"{name} "), console, label=label, most=most)

    if doubts := doubts_line(verdict):
        lines += fitted(doubts, console, label="  ", most=room and 2)
    lines += clause("entropy", entropy_line(verdict), room and 4)
    for one in shown:
        lines += clause(one.name, effect_line(one, verdict), room and room.clause)
    if left_out := len(verdict.observables) - len(shown):
        lines.append(Text(f"  and {left_out} more: -v"))
    return lines


def _under(results: Results, console: Console, room: Room) -> list[Text]:
    """Causes, what the step lacks of the run's, where to sample anew, the checks that failed."""
    whose = momentum_lines(results.momentum, results.next_lr.value)[:1]
    lines = [part for line in whose for part in fitted(line, console, most=1)]
    for line in largest_causes(results):
        lines = [*fitted(line, console, most=room.causes - len(lines)), *lines]
    if found := results.unlike_the_run:
        more = f" (and {len(found) - 1} more: -v)" if len(found) > 1 else ""
        lines += fitted(f"not the step of the run{more}: {found[0]}", console, most=1)
    if any(row.verdict == "resample" and row.resampled is None for row in results.sweep):
        lines += fitted("to sample responses there: --set measure.resample=true", console, most=1)
    count, *failed = check_lines(results.checks)
    more = f", {len(failed) - 2} more did not: -v" if len(failed) > 2 else ""
    lines += fitted(count + more, console, most=1)
    return lines + [part for x in failed[:2] for part in fitted(x, console, most=room.failed)]


def _details(results: Results, console: Console) -> None:
    if (others := observable_tables.table(results)) is not None:
        console.print(others)
    for line in (
        *causes(results),
        *about_v(results),
        *under_the_table(results),
        *beyond_shares(results),
        *influence_lines(results),
    ):
        _print(fitted(line, console), console)
    print_checks(results.checks, console, verbose=True)
    _print(fitted(cost_line(results.cost), console), console)


def _print(lines: Iterable[Text], console: Console) -> None:
    for line in lines:
        console.print(line)
