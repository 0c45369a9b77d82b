"""What a parser may do with a file from a stranger, and how a violation is noticed."""

import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from funcprobe.types import InputError

LONGEST = 10.0  # seconds
TIMES = 4  # the file's size
ALLOWANCE = 64 << 20  # bytes beside them: what libraries take of themselves, once
LONGEST_LINE = 4000  # characters of a message

# Events of sys.audit that run code, start processes or use the network.
FORBIDDEN = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
    *("subprocess.Popen", "pickle.find_class"),
    *("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"),
}
PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Violation(AssertionError):  # noqa: N818 as Hypothesis names its own
    """A parser did what none may do."""


class Guard:
    """Runs a reader on one input; raises Violation, or passes on an exception other than InputError.

    `watch` also looks for code, processes, connections and writes outside `folder`. It cannot be ended:
    for a process of its own.
    """

    def __init__(self, folder: Path, allowance: int = ALLOWANCE) -> None:
        self.folder, self.allowance = folder.resolve(), allowance
        self.active = False
        self.seen: list[str] = []

    def watch(self) -> None:
        sys.addaudithook(self._hear)

    def run(self, read: Callable[[bytes], object], data: bytes) -> str | None:
        """What the parser said, where it rejected the input."""
        self.seen.clear()
        before, start = peak_memory(), time.perf_counter()
        said, rejected = None, None
        self.active = True
        try:
            read(data)
        except InputError as error:
            said, rejected = str(error), error
        finally:
            self.active = False
        seconds, grown = time.perf_counter() - start, peak_memory() - before
        if self.seen:
            raise Violation(f"{self.seen[:3]}")
        if seconds > LONGEST:
            raise Violation(f"took {seconds:.1f} s")
        if grown > TIMES * len(data) + self.allowance:
            raise Violation(f"took {grown >> 20} MiB for {len(data)} bytes")
        if said is not None:
            try:
                require_line(said)
            except Violation as error:
                raise error from rejected
        return said

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in FORBIDDEN and not (event == "socket.connect" and _is_local(arguments)):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event in {"os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.truncate", "os.chmod"}:
            if arguments[-1] in (-1, None) or not isinstance(arguments[-1], int):  # else: of a folder's
                self._require_inside(event, arguments[0])
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self._require_inside(event, arguments[0])

    def _require_inside(self, event: str, name: Any) -> None:
        if not isinstance(name, str | bytes | os.PathLike):
            return
        path = Path(os.path.realpath(os.fsdecode(name)))
        allowed = (self.folder, Path(tempfile.gettempdir()).resolve(), Path("/dev"))
        if not any(path.is_relative_to(one) for one in allowed) and path.suffix != ".pyc":
            self.seen.append(f"{event} of {path}")


def require_line(said: str) -> None:
    """Violation unless the command prints one line of bounded length, without control characters."""
    from funcprobe.adapters.cli import _line

    line = _line(said)
    if not line.isprintable() or len(line) > LONGEST_LINE:
        raise Violation(f"a message of {len(line)} characters: {line!r:.300}")


def peak_memory() -> int:
    """Bytes; the largest so far, so that a smaller one after it is not seen."""
    # Not getrusage's, which begins with that of the process that started this one.
    return int(PEAK.search(Path("/proc/self/status").read_text("ascii"))[1]) * 1024


def _is_local(arguments: tuple[Any, ...]) -> bool:
    return isinstance(arguments[0], socket.socket) and arguments[0].family == socket.AF_UNIX
