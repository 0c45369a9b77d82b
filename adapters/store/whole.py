"""Files and folders that are complete or absent, whatever ends the process."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from funcprobe.types import InputError

from ..machine.ending import UNBROKEN
from .places import require_writable

RETRIES = (0.05, 0.2, 1.0)  # seconds
PASSING = {errno.EBUSY, errno.ESTALE, errno.EINTR}


@contextmanager
def run_folder(final: Path) -> Iterator[Path]:
    """A run folder that appears, or is replaced, if the block succeeds; see `whole_folder`."""
    require_writable(final)
    with whole_folder(final) as staging:
        yield staging


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block succeeds and is deleted otherwise."""
    with UNBROKEN:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        old = staging.with_name(f"{staging.name}.old")
        try:
            with UNBROKEN.interruptible():
                yield staging
            staging.chmod(0o755)  # mkdtemp creates a private one
            if final.exists():
                moved(final, old)
            moved(staging, final)
        finally:
            if old.exists() and not final.exists():
                moved(old, final)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write `path` by write(target); it appears, or is replaced, only when complete.

    Parent folders are created. If `write` raises, `path` is unchanged; an error of safetensors becomes
    InputError.
    """
    target = path.with_name(f".{path.name}.{os.getpid()}")
    with UNBROKEN:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with UNBROKEN.interruptible():
                write(target)
            moved(target, path)
        except SafetensorError as error:  # also raised for a full disk
            raise InputError(f"{path} cannot be written: {error}") from error
        finally:
            with suppress(FileNotFoundError):
                target.unlink()


def moved(here: Path, there: Path) -> None:
    """Rename, again after a moment where a network file system was busy or had lost its handle."""
    for wait in RETRIES:
        try:
            here.replace(there)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(wait)
        else:
            return
    here.replace(there)
