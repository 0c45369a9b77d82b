"""File locks: one process at a time for a run, for a stage, for what deletes stages.

A lock is the kernel's (flock) and ends with its process, also with one that is killed; beside it lies a
file that says who holds it. Waiting is by the monotonic clock.
"""

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from funcprobe.types import InputError

from .whole import write_whole

SILENT = 0.5  # seconds of waiting that need no line: another process reads, or lists
EVERY = 0.1  # seconds between attempts
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def held(
    path: Path,
    what: str,
    say: Callable[[str], None],
    *,
    patience: float | None = None,
    remedy: str = "",
) -> Iterator[None]:
    """Hold the lock `path` of `what`; if another process does, wait, with a line that says for whom.

    After `patience` seconds InputError, which ends with `remedy`; None: as long as the other one lives.
    Where the file system has no locks, a line says so and none is held. At the end the lock's file is
    deleted, and so are folders that were made for it and are empty.
    """
    made, lock = _parents(path), FileLock(path)
    try:
        locked = _acquired(lock, SILENT)
        if not locked:
            say(f"{what} is in use by {holder(path)}: waiting for it")
            locked = _acquired(lock, -1 if patience is None else patience)
        if not locked:
            raise InputError(f"{what} is in use by {holder(path)}: {remedy}")
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        say(f"warning: {path.parent} has no file locks: start no second run there at the same time")
        yield
        return
    if isinstance(lock, SoftFileLock):
        say(f"warning: {path.parent} has no file locks: if this run is killed, delete {path}")
    try:
        write_holder(path)
        yield
    finally:
        with suppress(OSError):  # a folder that was deleted, or may be read alone, meanwhile
            _holder_file(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # who waits for it sees that it is gone, and makes another
        with suppress(OSError):
            lock.release()
        with suppress(OSError):  # it is not empty
            for folder in made:
                folder.rmdir()


def is_held(path: Path) -> bool:
    """Whether a process holds this lock; this one counts."""
    lock = FileLock(path)
    try:
        if not path.exists():
            return False
        if not _acquired(lock, 0):
            return True
        lock.release()
    except (NotImplementedError, OSError):
        return True  # cannot be known
    return False


def holder(path: Path) -> str:
    """Who holds a lock, for a message."""
    found = holder_facts(path)
    try:
        return f"process {int(found['pid'])} on {found['host']!s:.80}, since {found['since']!s:.40}"
    except (KeyError, ValueError, TypeError):
        return "another process"


def holder_facts(path: Path) -> dict[str, Any]:
    """What the holder wrote beside its lock; empty if that cannot be read."""
    try:
        found = json.loads(_holder_file(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_holder(path: Path, **more: Any) -> None:
    """Say that this process holds the lock, since now unless `more` has the time.

    The lock holds without it: that a disk is full is said where something is lost.
    """
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since} | more)
    with suppress(OSError):
        write_whole(_holder_file(path), lambda target: target.write_text(text, encoding="utf-8"))


def _parents(path: Path) -> list[Path]:
    """The folders that had to be made for this file, the innermost first."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return made


def _holder_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def _acquired(lock: FileLock, seconds: float) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a soft one, of which `held` has a line
        for _ in range(3):
            try:
                lock.acquire(timeout=seconds, poll_interval=EVERY)
            except Timeout:
                return False
            except FileNotFoundError:  # another process ended, and removed its empty folder
                _parents(Path(lock.lock_file))
            else:
                return True
    raise InputError(f"{lock.lock_file} cannot be made: its folder is deleted again and again")
