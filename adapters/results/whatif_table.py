"""What `funcprobe whatif` prints: which rule keeps the entropy, the table of rules, the limits."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cost import cost_line
from .digits import power_of
from .fitted import fitted
from .quantity import Interval
from .whatif_sections import ChangeSection, RuleRow, Solution, WhatIf

WIDE = 112  # columns of the whole table; a narrower one leaves out predictions and the tokens touched
LINES = 29  # of 80 columns; one more says where the file is
NAME = 24  # columns of a rule's name, where it is not wrapped
TABLE_HEAD = 5  # lines: two of the title, two of columns, a rule


class Scale(NamedTuple):
    """A common power of ten of a table's columns, and the decimals that leave four digits."""

    power: int
    decimals: int

    @property
    def unit(self) -> str:
        return f"1e{self.power} " if self.power else ""

    def signed(self, value: float) -> str:
        return f"{round(value / 10**self.power, self.decimals) + 0.0:+.{self.decimals}f}"  # no -0.000

    def half(self, interval: Interval | None) -> str:
        return "-" if interval is None else f"{interval.half_width / 10**self.power:.{self.decimals}f}"

    def both(self, value: float, interval: Interval | None) -> str:
        """The number and half the width of its interval; "-" without one, as it is not reliable."""
        return "-" if interval is None else f"{self.signed(value)} ± {self.half(interval)}"


def scale_of(values: Sequence[float]) -> Scale:
    """By the largest: 1 to 999 in the table, in steps of a thousand."""
    largest = max(map(abs, values), default=0.0)
    if largest == 0:
        return Scale(0, 3)
    digits = power_of(largest)
    power = 3 * math.floor(digits / 3)
    return Scale(power, 3 - (digits - power))


def print_whatif(document: WhatIf, console: Console, *, verbose: bool = False) -> None:
    """What was found and solved for, in words; the table; what was left out.

    At most 29 lines at 80 columns; with `verbose` every rule, every finding, the limits and the cost.
    """
    if verbose:
        solution = [] if document.solution is None else [_solution(document.solution)]
        _print([*document.findings, *solution], console)
        console.print(_table(document, document.rules, console.width, verbose=True))
        _print([*_under(document), cost_line(document.cost)], console)
        return
    for per_finding, per_note in ((4, 2), (3, 2), (2, 1), (1, 1)):
        above = _fitted(_largest_findings(document), console, per_finding)
        below = _fitted(_notes(document), console, per_note)
        room = LINES - len(above) - len(below) - TABLE_HEAD - 1
        if room >= min(len(document.rules), 12):
            break
    rows: Sequence[RuleRow] = document.rules
    left_out = ""
    if len(rows) > room + 1:
        rows = _chosen(document, room)
        left_out = f"{len(document.rules) - len(rows)} rules more with -v"
    _print_lines(above, console)
    console.print(_table(document, rows, console.width, verbose=False))
    _print_lines([*([Text(left_out)] if left_out else []), *below], console)


def _fitted(lines: Iterable[str], console: Console, most: int | None = None) -> list[Text]:
    return [part for line in lines for part in fitted(line, console, most=most)]


def _print(lines: Sequence[str], console: Console) -> None:
    _print_lines(_fitted(lines, console), console)


def _print_lines(lines: Iterable[Text], console: Console) -> None:
    for line in lines:
        console.print(line)


def _largest_findings(document: WhatIf) -> list[str]:
    """What a person acts on: the rule that keeps the entropy, what was solved for, what is curved."""
    lines = [x for x in document.findings if " keeps the entropy" in x or " the least entropy" in x]
    lines += [] if document.solution is None else [_solution(document.solution)]
    curved = [x for x in document.findings if "; not for " in x or "beyond the range" in x]
    return [*(lines or document.findings[:1]), *curved]


def _notes(document: WhatIf) -> list[str]:
    """Rules that were left out, unreliable weights, what the step lacks of the run's."""
    lines = []
    if document.left_out:
        lines.append(f"left out (why: -v): {', '.join(one.rule for one in document.left_out)}")
    if spoilt := [row.rule for row in document.rules if row.verdict == "resample"]:
        lines.append(f"weights not reliable (why: -v): {', '.join(spoilt)}")
    if chosen := [row.rule for row in document.rules if row.chosen_on_E]:
        lines.append(f"chosen on the same E that measures it, so that it gains: {', '.join(chosen)}")
    return lines + [f"not the step of the run: {line}" for line in document.unlike_the_run[:1]]


def _chosen(document: WhatIf, most: int) -> list[RuleRow]:
    """The run's own rule, what was solved for, and those that raise the entropy most against it."""
    own, *others = document.rules
    solved = document.solution.row if document.solution else None
    first = [row for row in others if row.rule == solved]
    rest = [row for row in others if row.rule != solved]
    rest.sort(key=lambda row: -row.entropy.difference.value)
    kept = {row.rule for row in [own, *first, *rest][:most]}
    return [row for row in document.rules if row.rule in kept]


def _table(document: WhatIf, rows: Sequence[RuleRow], width: int, *, verbose: bool) -> Table:
    """A row a rule; with `verbose`, where there is room, predictions and the tokens touched as well."""
    entropy = _scale([row.entropy for row in document.rules])
    reward = _scale([row.reward for row in document.rules if row.reward is not None])
    which = " (the next step's)" if document.is_next_lr else ""
    title = (
        f"Measured change by one step of lr {document.learning_rate.value:.3g}{which}, ±: 95 % over "
    )
    title += f"E, given U; entropy in {entropy.unit}{document.entropy.unit}"
    if document.reward is not None:
        title += f", reward in {reward.unit.strip() or 'its unit'}"
    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    wide = verbose and width >= WIDE
    table.add_column("rule", overflow="fold")
    rewarded = document.reward is not None
    heads = [*(["touched"] if wide else []), *(["entropy\npredicted"] if wide else [])]
    heads += ["entropy\nmeasured", "entropy\nless own"]
    heads += [*(["reward\npredicted"] if wide and rewarded else [])]
    heads += ["reward\nmeasured"] if rewarded else []
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        of = row.entropy
        cells = [f"{row.touched.value:.0%}", entropy.signed(of.predicted.value)] if wide else []
        cells.append(entropy.both(of.measured.value, of.measured_interval_given_U))
        own = row.rule == document.rules[0].rule
        cells.append("" if own else entropy.both(of.difference.value, of.difference_interval))
        if row.reward is not None:
            cells += [reward.signed(row.reward.predicted.value)] if wide else []
            found = row.reward.measured_interval_given_U
            cells.append(reward.both(row.reward.measured.value, found))
        table.add_row(Text(row.rule if verbose else _short(row.rule)), *cells)
    return table


def _short(rule: str) -> str:
    """On one line beside the numbers; -v has the whole."""
    return rule if len(rule) <= NAME else f"{rule[: NAME - 4]} ..."


def _scale(changes: Sequence[ChangeSection]) -> Scale:
    intervals = [c.measured_interval_given_U for c in changes]
    halves = [one.half_width for one in intervals if one is not None]
    values = [value for c in changes for value in (c.predicted.value, c.measured.value)]
    return scale_of([*values, *halves])


def _under(document: WhatIf) -> list[str]:
    lines = [f"left out: {one.rule}: {one.reason}" for one in document.left_out]
    lines += [
        f"{row.verdict}: {row.rule}: {row.verdict_reason}"
        for row in document.rules
        if row.verdict != "trust"
    ]
    if document.frontier is not None:
        front = [point.rule for point in document.frontier.points if not point.dominated]
        lines.append(
            f"Frontier of entropy and reward, by the measured changes: {', '.join(front) or 'none'}"
        )
    lines += [f"Not the step of the run: {line}" for line in document.unlike_the_run]
    return [*lines, *(f"Note: {line}" for line in document.limits)]


def _solution(found: Solution) -> str:
    low, high = found.reachable
    verdict = "the weights are not reliable there"
    if found.within_error is not None:
        verdict = "within its error" if found.within_error else "beyond its error: curvature"
    known, coefficient = found.coefficient_interval, ""
    if known is not None:
        coefficient = f" (95 %, over E: {known.low:.3g} to {known.high:.3g})"
    return (
        f"Solved, entropy change {found.target.value:g}: {found.row}{coefficient}; predicted off by "
        f"{found.predicted_missed.value:+.1e}, measured by {found.measured_missed.value:+.1e} "
        f"{found.target.unit} ({verdict}); reachable {low:+.2e} to {high:+.2e}"
    )
