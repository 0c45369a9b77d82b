"""What stages are stored: listed, bounded by size and age, cleared."""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .leases import LOCKS, deleting, in_use
from .locks import is_held
from .sealed import about

DAY = 86_400.0  # seconds
GIB = 2**30
# A whole stage, its progress so far, or one of a version that had no checksums.
_STORED = re.compile(
    r"(?P<whole>(?P<stage>[\w.-]+)-[0-9a-f]{20})(?P<progress>(\.\w+)*\.progress)?"
    r"\.(safetensors|parquet|json)"
)
_NAME = re.compile(r"\w[\w.-]{0,99}")
_LEFT = re.compile(r"\.(?P<whole>[\w.-]+-[0-9a-f]{20})\.[\w.]*\.\d+")  # by a process that was killed


class Stored(NamedTuple):
    """One file of the cache."""

    path: Path
    stage: str
    progress: bool  # of a stage that is not complete
    run: str  # that computed it; empty if not known
    size: int  # bytes
    used: float  # when it was read or written last, seconds since the epoch
    in_use: bool  # by a run in progress

    def age(self, now: float) -> float:
        """Seconds since its last use; none if the clock went back."""
        return max(0.0, now - self.used)


class Freed(NamedTuple):
    """What was deleted, and what was kept although it was meant: runs use it."""

    deleted: list[Stored]
    kept: list[Stored]


def stored(folder: Path) -> list[Stored]:
    """Every stage of a cache, the one least recently used first; nothing else that lies there."""
    if not folder.is_dir():
        return []
    busy, found = in_use(folder), []
    for path in folder.iterdir():
        match = _STORED.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_file():
            continue
        try:
            facts = path.stat()
        except FileNotFoundError:  # by another process, meanwhile
            continue
        held = path.name in busy or match["whole"] in busy
        run = about(path).get("run", "") if path.suffix == ".safetensors" else ""
        run = run if _NAME.fullmatch(run) else ""  # text that no run wrote may be anything
        found.append(
            Stored(
                *(path, match["stage"], match["progress"] is not None, run),
                *(facts.st_size, facts.st_mtime, held),
            )
        )
    return sorted(found, key=lambda one: (one.used, one.path.name))


def clear(folder: Path, say: Callable[[str], None], older_than: float | None = None) -> Freed:
    """Delete the stages not used for `older_than` days, by default all; but those in use."""
    now = time.time()

    def meant(every: list[Stored]) -> list[Stored]:
        return [one for one in every if older_than is None or one.age(now) > older_than * DAY]

    return _delete(folder, meant, say)


def bound(folder: Path, size: float, days: float, say: Callable[[str], None]) -> Freed:
    """Delete what was not used for `days`, then the least recently used, until `size` GiB are left."""
    now = time.time()

    def meant(every: list[Stored]) -> list[Stored]:
        left, found = sum(one.size for one in every), []
        for one in every:
            if one.age(now) > days * DAY or left > size * GIB:
                found.append(one)
                left -= 0 if one.in_use else one.size
        return found

    try:
        freed = _delete(folder, meant, say)
    except OSError as error:  # of other users; what was computed is whole
        say(f"warning: {folder} is not bounded: {error.filename}: {error.strerror}")
        return Freed([], [])
    if freed.deleted:
        total = sum(one.size for one in freed.deleted)
        say(f"{folder}: {len(freed.deleted)} stages were deleted, {total / GIB:.2f} GiB freed")
    return freed


def _delete(
    folder: Path, meant: Callable[[list[Stored]], Iterable[Stored]], say: Callable[[str], None]
) -> Freed:
    if not folder.is_dir():
        return Freed([], [])
    with deleting(folder, say):
        deleted, kept = [], []
        for one in meant(stored(folder)):
            if one.in_use:
                kept.append(one)
            else:
                one.path.unlink(missing_ok=True)
                deleted.append(one)
        _sweep_up(folder)
    return Freed(deleted, kept)


def _sweep_up(folder: Path) -> None:
    """Files that a killed process had begun to write."""
    for path in folder.glob(".*"):
        match = _LEFT.fullmatch(path.name)
        if match and not is_held(folder / LOCKS / f"{match['whole']}.lock"):
            path.unlink(missing_ok=True)
