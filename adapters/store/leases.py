"""A run's hold on its folder: its lock, and the stages that it uses, which nobody deletes meanwhile."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..machine.ranks import ONE_PROCESS, World
from .locks import held, holder_facts, is_held, write_holder

FOLDER = ".stages"  # beside the runs
LOCKS = "locks"
PATIENCE = 10.0  # seconds: a run that is about to end
REMEDY = "wait for it, end it, or choose another run.name"


class Lease:
    """Of one run; `use` says which stored stages are its own as long as it goes on."""

    def __init__(self, stages: Path, lock: Path, say: Callable[[str], None]) -> None:
        self._stages, self._lock, self._say = stages, lock, say
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.used: set[str] = set()

    def use(self, stage: Path) -> None:
        """Before it is read or written."""
        if stage.name in self.used:
            return
        with deleting(self._stages, self._say):
            self.used.add(stage.name)
            write_holder(self._lock, since=self._since, uses=sorted(self.used))


@contextmanager
def lease(final: Path, say: Callable[[str], None], world: World = ONE_PROCESS) -> Iterator[Lease]:
    """Hold the run folder `final`, of several processes by the first; InputError if another run does.

    What a run of this name left that was killed is removed, or put back.
    """
    stages = final.parent / FOLDER
    path = stages / LOCKS / f"run-{final.name}.lock"
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(held(path, str(final), say, patience=PATIENCE, remedy=REMEDY))
            recover(final)

        world.on_first(hold)
        yield Lease(stages, path, say)


@contextmanager
def deleting(stages: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Held while stages are deleted, and while a run says that it uses one: no longer than that."""
    with held(stages / LOCKS / "deleting.lock", str(stages), say):
        yield


def in_use(stages: Path) -> set[str]:
    """Names of the files that runs in progress use, and beginnings of those that they compute."""
    found: set[str] = set()
    for lock in (stages / LOCKS).glob("*.lock"):
        if lock.name != "deleting.lock" and is_held(lock):
            uses = holder_facts(lock).get("uses", [])
            found |= {str(name) for name in uses} if isinstance(uses, list) else set()
            found.add(lock.name.removesuffix(".lock"))
    return found


def recover(final: Path) -> None:
    """Remove what a killed process left of this run; put the older run back if it had moved it away.

    Called by who holds the lock, so that nobody writes there.
    """
    temporary = re.compile(rf"\.{re.escape(final.name)}\.[a-z0-9_]{{8}}(\.old)?")
    files = re.compile(rf"\.{re.escape(final.name)}\.whatif\.json\.\d+")
    if not final.parent.is_dir():
        return
    for path in sorted(final.parent.iterdir()):
        if (match := temporary.fullmatch(path.name)) and path.is_dir():
            if match[1] and not final.exists():
                path.replace(final)
            else:
                shutil.rmtree(path, ignore_errors=True)
        elif files.fullmatch(path.name):
            path.unlink(missing_ok=True)
