"""Files and folders that are complete or absent, whatever ends the process."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from funcprobe.types import InputError

from ..machine.watch import UNBROKEN
from .places import require_writable


@contextmanager
def run_folder(final: Path) -> Iterator[Path]:
    """A run folder that appears, or is replaced, if the block succeeds; see `whole_folder`."""
    require_writable(final)
    with whole_folder(final) as staging:
        yield staging


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block succeeds and is deleted otherwise."""
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    old = staging.with_name(f"{staging.name}.old")
    with UNBROKEN:
        try:
            yield staging
            staging.chmod(0o755)  # mkdtemp creates a private one
            if final.exists():
                final.replace(old)
            staging.replace(final)
        finally:
            if old.exists() and not final.exists():
                old.replace(final)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write `path` by write(target); it appears, or is replaced, only when complete.

    Parent folders are created. If `write` raises, `path` is unchanged; an error of safetensors becomes
    InputError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.with_name(f".{path.name}.{os.getpid()}")
    with UNBROKEN:
        try:
            write(target)
            target.replace(path)
        except SafetensorError as error:  # also raised for a full disk
            raise InputError(f"{path} cannot be written: {error}") from error
        finally:
            target.unlink(missing_ok=True)
