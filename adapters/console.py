"""Output during a run: log lines and progress bars; the cost of its stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .machine.cost import Cost, Stage
from .machine.memory import device_peak, process_peak, reset_peaks

EVERY = 30.0  # seconds between the lines of a stage where no progress bar is seen
LONGEST_LINE = 2000  # characters of a message; the longest of this package itself has about 600
LONG = 10.0  # seconds from which a stage without a number of sequences has a line there


def excerpt(text: str, *, beginning: int = 240, end: int = 120) -> str:
    """Text of a data set or a model on one line of bounded length, in quotes.

    As Python writes it: control characters, line ends, and what changes the direction or is invisible
    as escapes, so that a terminal obeys none of it.
    """
    few = text if len(text) <= beginning + end else text[:beginning] + text[-end:]
    shown = repr(few)
    if few == text and len(shown) <= beginning + end:
        return shown
    return f"{shown[:beginning]} ... {shown[-end:]}"


def printable(text: str) -> str:
    """The text with control characters, and what is invisible or changes the direction, as escapes.

    So that a terminal, or a reader of a log, obeys nothing that a file's names contain. Line ends and
    tabs stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(message: str) -> str:
    """A message that quotes what a file contains: one line of bounded length, as `printable`."""
    shown = printable(" ".join(message.split()))
    most = LONGEST_LINE // 2
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:most]} ... {shown[-most:]}"


class Terminal(Console):
    """A console on which every text is `printable`, cells of tables included."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def duration(seconds: float) -> str:
    """With two digits: 40 s, 6 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds, -1 if seconds >= 20 else 0)):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.2g} h"


class Narrator:
    """Prints lines to stderr, shows a progress bar per stage, collects lines and costs for the run."""

    def __init__(self, console: Console | None = None, processes: int = 1) -> None:
        self.processes = processes  # that share the work; each counts its own
        # In Jupyter rich would make an output of its own of every line.
        self.console = console or Terminal(stderr=True, highlight=False, force_jupyter=False)
        self.lines: list[str] = []
        self.costs: dict[str, Cost] = {}
        self._end: float | None = None  # of the run as it was foretold, by time.perf_counter()

    def expect(self, seconds: float | None) -> None:
        """From now on bars say what is left of so many seconds; None: not known."""
        self._end = None if seconds is None else time.perf_counter() + seconds

    def say(self, line: str) -> None:
        """Print a line and add it to the log."""
        line = printable(line)
        self.lines.append(line)
        self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A stage of about `total` sequences, whose cost is recorded; stages do not nest.

        On a terminal a progress bar; in a log file a line every half minute, and one at the end.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[run]}"),
        )
        cost = self.costs.setdefault(name, Cost(name))
        cost.peak_of_stage = reset_peaks()
        start = time.perf_counter()
        quiet = not self.console.is_terminal
        due, done = EVERY, 0
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as progress:
            task = progress.add_task(name, total=total, run=self._left(start))

            def advance(sequences: int) -> None:
                nonlocal due, done
                sequences *= self.processes
                if total is not None:
                    sequences = min(sequences, total - done)
                done += sequences
                now = time.perf_counter()
                progress.update(task, advance=sequences, run=self._left(now))
                elapsed = now - start
                if quiet and elapsed >= due:
                    due = elapsed + EVERY
                    of_run = f" ({left})" if (left := self._left(now)) else ""
                    self._print(f"{name}: {_so_far(done, total, elapsed)}{of_run}")

            yield Stage(cost, advance, total, self.say)
        seconds = time.perf_counter() - start
        if quiet and (total is not None or seconds >= LONG):
            self._print(f"{name}: {seconds:.1f} s")
        cost.seconds += seconds
        cost.process_peak = max(cost.process_peak, process_peak())
        peak = device_peak()
        cost.device_peak = peak if cost.device_peak is None else max(cost.device_peak, peak or 0)
        reused = f" ({cost.reused} of {cost.reused + cost.computed} from runs/.stages)"
        self.lines.append(f"{name}: {seconds:.1f} s{reused if cost.reused else ''}")

    def _left(self, now: float) -> str:
        """Of the whole run, as long as it is not beyond what was foretold."""
        if self._end is None or now >= self._end:
            return ""
        return f"run: some {duration(self._end - now)} left"


def _so_far(done: int, total: int | None, elapsed: float) -> str:
    """Sequences passed, seconds, and what is left at that rate."""
    if not total:
        return f"{elapsed:.0f} s"
    left = f", about {elapsed * (total - done) / done:.0f} s left" if 0 < done < total else ""
    return f"{done} of {total} sequences, {elapsed:.0f} s{left}"
