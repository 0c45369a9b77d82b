"""What a run says while it works: lines, progress bars, phase timings."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Narrator:
    """Says lines on stderr, shows a bar per phase, and keeps both for run.log and the results."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.lines: list[str] = []
        self.seconds: dict[str, float] = {}

    def say(self, line: str) -> None:
        """One line to the reader and to the log."""
        self.lines.append(line)
        self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A timed phase of `total` steps; the block calls what it gets with the steps just done."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        start = time.perf_counter()
        quiet = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.advance(task, done)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.lines.append(f"{name}: {self.seconds[name]:.1f} s")
