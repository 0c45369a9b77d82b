"""How signals end a process: with an exception, in a line, and never between two steps of a write."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "ended by SIGTERM"}
_WORDS["SIGHUP"] = "ended by SIGHUP, as of a terminal that was closed"
STORED = "finished stages are stored, no incomplete file was left"


def status(received: signal.Signals) -> int:
    """The exit status of a process that this signal ended, as in shells: 130, 143, 129."""
    return 128 + received


def words(received: signal.Signals) -> str:
    """What is said at the end."""
    return f"{_WORDS[received.name]}; {STORED}"


class Unbroken:
    """Held while a file or a folder is written: no end of the process falls into it.

    In the main thread a signal waits for the end of the block, but not in a block of `interruptible`
    inside; `watch.py`, which ends the process from another thread, waits for the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0  # of the main thread, which alone handles signals
        self._waiting = False
        self.received: signal.Signals | None = None

    def acquire(self, timeout: float) -> bool:
        """For the rest of the process."""
        return self._lock.acquire(timeout=timeout)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += _is_main()

    def __exit__(self, *_: object) -> None:
        self._depth -= _is_main()
        self._lock.release()
        self._end_if_due()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A part in which nothing is half done that the rest of the block would not undo."""
        depth = self._depth
        try:
            if _is_main():
                self._depth = 0
                self._end_if_due()
            yield
        finally:
            if _is_main():
                self._depth = depth

    def handle(self, number: int, _: FrameType | None) -> None:
        """A signal handler: KeyboardInterrupt, which libraries let pass, now or after the write."""
        self.received = signal.Signals(number)
        self._waiting = True
        self._end_if_due()

    def _end_if_due(self) -> None:
        if self._waiting and not self._depth and _is_main():
            self._waiting = False
            raise KeyboardInterrupt


UNBROKEN = Unbroken()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in this block, unless they were ignored.

    As by nohup, or for a job in the background of a shell. `UNBROKEN.received` says which one came.
    """
    before: dict[signal.Signals, Any] = {}
    UNBROKEN.received = None
    plain: tuple[Callable[..., Any] | int, ...] = (signal.SIG_DFL, signal.default_int_handler)
    try:
        for one in SIGNALS if _is_main() else ():
            if signal.getsignal(one) in plain:
                before[one] = signal.signal(one, UNBROKEN.handle)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
