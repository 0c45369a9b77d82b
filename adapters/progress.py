"""One line of progress over several runs, with the time left."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from .console import EVERY, Narrator
from .machine.cost import Stage

WARNING = "warning: "


class Progress:
    """On a terminal a bar over the checkpoints; in a log file a line a checkpoint, and every half
    minute. What the runs say is in their run.log; of their warnings each is shown once."""

    def __init__(self, narrator: Narrator, total: int, groups: int = 1) -> None:
        self._groups = groups  # of processes, each at another checkpoint
        self._say, self._total = narrator, total
        self._seen: set[str] = set()
        self._seconds: list[float] = []  # of the runs that were computed
        self._count, self._name, self._stage = 0, "", ""
        self._began = self._printed = time.perf_counter()
        self._run: Narrator | None = None
        columns = (
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[left]}"),
        )
        self._quiet = not narrator.console.is_terminal
        self._bar = bars.Progress(
            *columns, console=narrator.console, transient=True, disable=self._quiet
        )
        self._task = self._bar.add_task("", total=total, left="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, name: str, number: int) -> Narrator:
        """The checkpoint of this number, from 1; what its run is to speak to."""
        self._count = number
        self._name, self._stage, self._began = name, "load", time.perf_counter()
        self._run = _Watched(self)
        self._show()
        return self._run

    def loaded(self, reason: str | None) -> None:
        """`reason`: why the base was loaded anew, None if it was not."""
        if reason is not None and self._count > 1:
            self._print(f"{self._name}: the base was loaded anew, as {reason}")

    def at(self, stage: str) -> None:
        """The run is at this stage."""
        self._stage = stage
        self._show()
        now = time.perf_counter()
        if self._quiet and now - self._printed >= EVERY:
            self._print(f"{self._place()}: {stage}, {now - self._began:.0f} s{_after(self._left())}")

    def done(self, found: str, *, reused: bool) -> None:
        """The run is there; what it found, in a few words."""
        if not reused:
            self._seconds.append(time.perf_counter() - self._began)
        took = "as before" if reused else f"{self._seconds[-1]:.0f} s"
        self._end(f"{found}; {took}")

    def failed(self, reason: str) -> None:
        """The checkpoint was rejected."""
        self._end(f"failed: {reason}")

    def _end(self, what: str) -> None:
        assert self._run is not None  # for the type checker: start() is called before
        for line in self._run.lines:
            if line.startswith(WARNING) and line not in self._seen:
                self._seen.add(line)
                self._print(f"{self._name}: {line}")
        self._stage, self._began = "", time.perf_counter()
        self._print(f"{self._place()}: {what}{_after(self._left(finished=True))}")
        self._bar.update(self._task, completed=self._count)

    def _place(self) -> str:
        return f"{self._name} ({self._count} of {self._total})"

    def _left(self, *, finished: bool = False) -> float | None:
        """Seconds, at the mean of the runs so far; None before the first."""
        if not self._seconds:
            return None
        each = sum(self._seconds) / len(self._seconds)
        current = 0.0 if finished else max(0.0, each - (time.perf_counter() - self._began))
        return each * (self._total - self._count) / self._groups + current

    def _show(self) -> None:
        left = _after(self._left()).removeprefix("; ")
        self._bar.update(self._task, description=f"{self._name}: {self._stage}", left=left)

    def _print(self, line: str) -> None:
        self._printed = time.perf_counter()
        self._say.say(line)


class _Watched(Narrator):
    """Silent; tells the progress where the run is."""

    def __init__(self, watcher: Progress) -> None:
        super().__init__(Console(file=io.StringIO(), quiet=True))
        self._watcher = watcher

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """As a run's."""
        with super().phase(name, total) as stage:
            self._watcher.at(name)

            def advance(sequences: int) -> None:
                stage.advance(sequences)
                self._watcher.at(name)

            yield stage._replace(advance=advance)


def _after(seconds: float | None) -> str:
    if seconds is None or seconds < 1:
        return ""
    return f"; about {seconds:.0f} s left" if seconds < 100 else f"; about {seconds / 60:.0f} min left"
