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


class Scale(NamedTuple):
    """A common power of ten of a table's columns, and the decimals that leave four digits."""

    power: int
    decimals: int

    @property
    def unit(self) -> str:
        return f"1e{self.power} " if self.power else ""

    def signed(self, value: float) -> str:
        return f"{value / 10**self.power:+.{self.decimals}f}"

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
    """The table, then what was left out, solved for and found, in words."""
    console.print(_table(document))
    for line in (*_under(document), cost_line(document.cost)):
        console.print(line, soft_wrap=True, markup=False, emoji=False)


def _table(document: WhatIf) -> Table:
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
    of_reward = () if document.reward is None else ("reward pred.", "measured", "±")
    for column in ("touched", "entropy pred.", "measured", "±", "- own", "±", *of_reward):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [*_cells(row.entropy, entropy), entropy.signed(row.entropy.difference.value)]
        cells.append(entropy.half(row.entropy.difference_interval))
        cells += [] if row.reward is None else _cells(row.reward, reward)
        table.add_row(Text(row.rule), f"{row.touched.value:.0%}", *cells)
    return table


def _cells(change: ChangeSection, scale: Scale) -> list[str]:
    measured = (scale.signed(change.measured.value), scale.half(change.measured_interval_given_U))
    return [scale.signed(change.predicted.value), *measured]


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
    lines += [f"Note: {line}" for line in document.limits]
    if document.solution is not None:
        lines.append(_solution(document.solution))
    return [*lines, *document.findings]


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
