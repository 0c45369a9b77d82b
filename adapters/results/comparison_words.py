"""A comparison in words, and as the table that is printed."""

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..console import excerpt
from .comparison_sections import ComparedRun, Comparison, EntropyPath
from .quantity import Interval

WIDTH = 80


def findings(
    runs: Sequence[ComparedRun], path: EntropyPath | None, order: str, unit: str
) -> tuple[str, ...]:
    """What happened to the entropy, whether the predictions say so, and what makes the change."""
    first, last = runs[0], runs[-1]
    said = []
    if path is not None:
        steps = f"steps {first.step} to {last.step}"
        paired = all(one.paired for one in path.between)
        said.append(
            f"{len(runs)} checkpoints of one training, {steps}: on E the entropy went from "
            f"{_level(first)} to {_level(last)} {unit}"
        )
        end = path.reached[-1]
        said.append(
            f"from each checkpoint to the next, the predicted change agrees with the actual one in "
            f"{path.agree} of {len(path.between)} cases (95 % intervals of their difference, "
            f"{'paired by draw of E' if paired else 'not all of them paired'})"
        )
        said.append(
            f"added up, the predictions reach {end.entropy:.4g} (at least 95 %: "
            f"{end.interval.low:.4g} to {end.interval.high:.4g}), the measured entropy "
            f"{last.entropy.value:.4g}"
        )
        outside = sum(_outside_0(one.predicted_interval) for one in path.between)
        said.append(f"{outside} of {len(path.between)} predicted changes differ from 0")
    else:
        low, high = (
            pick(
                runs, key=lambda one: one.relative if one.relative is not None else one.predicted.value
            )
            for pick in (min, max)
        )
        said.append(f"{len(runs)} runs, ordered by {order}")
        said.append(f"lowest predicted change: {_named(low)}, {_change(low)}")
        said.append(f"highest predicted change: {_named(high)}, {_change(high)}")
    said.append(_parts(first, last) if path is not None else _parts(low, high))
    return tuple(said)


def _size(run: ComparedRun) -> float:
    return run.predicted.value if run.relative is None else run.relative


def _named(run: ComparedRun) -> str:
    return excerpt(run.label, beginning=48, end=24)[1:-1]


def _level(run: ComparedRun) -> str:
    return f"{run.entropy.value:.4g} ± {run.entropy_interval.half_width:.2g}"


def _change(run: ComparedRun) -> str:
    if run.relative is None or run.relative_interval is None:
        over = run.predicted_interval
        bounds = f"95 %: {over.low:+.2g} to {over.high:+.2g}"
        return f"{run.predicted.value:+.3g} {run.predicted.unit} ({bounds})"
    low, high = run.relative_interval.low, run.relative_interval.high
    return f"{100 * run.relative:+.2g} % (95 %: {100 * low:+.2g} to {100 * high:+.2g}) by the next step"


def _parts(first: ComparedRun, last: ComparedRun) -> str:
    said = [
        f"{_named(run)}: momentum {run.momentum:+.2g}, this batch {run.update:+.2g}, "
        f"weight decay {run.decay:+.2g}"
        for run in (first, last)
    ]
    return f"parts of the predicted change, {first.predicted.unit}: {'; '.join(said)}"


def _outside_0(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0


def print_comparison(comparison: Comparison, console: Console) -> None:
    """At 80 columns: warnings, findings, a row a run; of checkpoints what happened until the next."""
    for line in comparison.warnings:
        _say(f"warning: {line}", console)
    for line in comparison.findings:
        _say(line, console)
    console.print(_table(comparison), width=WIDTH)


def _say(line: str, console: Console) -> None:
    console.print(Text(line), soft_wrap=True)


def _table(comparison: Comparison) -> Table:
    path, runs = comparison.path, comparison.runs
    table = Table(title=f"Entropy, {comparison.unit} (±: 95 %)", title_justify="left", box=box.SIMPLE)
    table.add_column("run", no_wrap=True)
    step = "next step" if all(run.next_lr > 0 for run in runs) else "per unit of lr"
    for name in ("entropy", step, *(("predicted", "actual") if path else ("momentum", "batch"))):
        table.add_column(name, justify="right", no_wrap=True)
    level = _decimals([run.entropy_interval.half_width for run in runs])
    halves = [one.actual_interval.half_width for one in path.between] if path else []
    halves += [one.predicted_interval.half_width for one in path.between] if path else []
    change = _decimals(halves)
    for i, run in enumerate(runs):
        half = run.entropy_interval.half_width
        cells = [_named_short(run), f"{run.entropy.value:.{level}f} ±{half:.{level}f}", _percent(run)]
        if path is None:
            cells += [f"{run.momentum:+.2e}", f"{run.update:+.2e}"]
        elif i < len(path.between):
            one = path.between[i]
            cells += [
                f"{one.predicted:+.{change}f} ±{one.predicted_interval.half_width:.{change}f}",
                f"{one.actual:+.{change}f} ±{one.actual_interval.half_width:.{change}f}"
                f"{'' if one.agrees else ' *'}",
            ]
        table.add_row(*map(Text, cells))
    if path:
        apart = " *: they differ" if path.agree < len(path.between) else ""
        table.caption = f"predicted, actual: change until the next checkpoint.{apart}"
        table.caption_justify = "left"
    return table


def _decimals(halves: Sequence[float]) -> int:
    """So that the largest of the intervals has two digits."""
    most = max((half for half in halves if half > 0), default=1.0)
    return min(max(1 - math.floor(math.log10(most)), 1), 4)


def _named_short(run: ComparedRun) -> str:
    return excerpt(run.label, beginning=14, end=5)[1:-1]


def _percent(run: ComparedRun) -> str:
    if run.relative is None or run.relative_interval is None:
        return f"{run.predicted.value:+.2e}"
    half = 100 * run.relative_interval.half_width
    decimals = _decimals([half])
    return f"{100 * run.relative:+.{decimals}f} ±{half:.{decimals}f} %"
