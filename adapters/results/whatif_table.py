"""What `funcprobe whatif` prints: the table of rules, and the lines under it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cost import cost_line
from .quantity import Interval
from .whatif_sections import ChangeSection, Solution, WhatIf

WIDE = 112  # columns of the whole table; a narrower one leaves out predictions and the tokens touched


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


def scale_of(values: Sequence[float]) -> Scale:
    """By the largest: 1 to 999 in the table, in steps of a thousand."""
    largest = max(map(abs, values), default=0.0)
    if largest == 0:
        return Scale(0, 3)
    digits = math.floor(math.log10(largest))
    power = 3 * math.floor(digits / 3)
    return Scale(power, 3 - (digits - power))


def print_whatif(document: WhatIf, console: Console) -> None:
    """What was found and solved for, in words; the table; what was left out, and the limits."""
    solution = [] if document.solution is None else [_solution(document.solution)]
    _print([*document.findings, *solution], console)
    console.print(_table(document, wide=console.width >= WIDE))
    _print([*_under(document), cost_line(document.cost)], console)


def _print(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, emoji=False)


def _table(document: WhatIf, *, wide: bool) -> Table:
    rows = document.rules
    entropy = _scale([row.entropy for row in rows])
    reward = _scale([row.reward for row in rows if row.reward is not None])
    which = ", the next step's" if document.is_next_lr else ""
    title = f"Change by one step, eta {document.learning_rate.value:.3g}{which}; entropy in "
    title += f"{entropy.unit}{document.entropy.unit}"
    if document.reward is not None:
        title += f", reward in {reward.unit.strip() or 'its unit'}"
    table = Table(title=f"{title} (±: 95 %, over E)", title_justify="left")
    table.add_column("rule", overflow="fold", max_width=34)
    of_entropy, of_reward = _columns("entropy", wide=wide), _columns("reward", wide=wide)
    touched = ("touched",) if wide else ()
    rewarded = () if document.reward is None else of_reward
    for column in (*touched, *of_entropy, "vs own", "±", *rewarded):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row.touched.value:.0%}"] if wide else []
        cells += _cells(row.entropy, entropy, wide=wide)
        cells.append(entropy.signed(row.entropy.difference.value))
        cells.append(entropy.half(row.entropy.difference_interval))
        cells += [] if row.reward is None else _cells(row.reward, reward, wide=wide)
        table.add_row(Text(row.rule), *cells)
    return table


def _columns(what: str, *, wide: bool) -> tuple[str, ...]:
    return (f"{what} pred", "measured", "±") if wide else (what, "±")


def _cells(change: ChangeSection, scale: Scale, *, wide: bool) -> list[str]:
    predicted = [scale.signed(change.predicted.value)] if wide else []
    measured = (scale.signed(change.measured.value), scale.half(change.measured_interval_given_U))
    return [*predicted, *measured]


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
