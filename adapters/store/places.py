"""Whether a run, or a file, can be written to its place; asked before the computation starts."""

import tempfile
from pathlib import Path

from funcprobe.types import InputError


def require_writable(final: Path) -> None:
    """InputError unless the run folder can be created.

    Tested with an empty folder beside it, since permissions alone do not reveal a name that is too long
    or a read-only file system.
    """
    parent = final.absolute().parent
    try:
        if final.exists() and not (final / "manifest.json").is_file():
            raise InputError(f"{final} exists and is not a run folder: choose another run.name")
        parent = next(p for p in final.absolute().parents if p.exists())
        Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise InputError(
            f"{final} cannot be written: {parent}: {error.strerror}; set run.folder or run.name"
        ) from error


def require_place(file: Path) -> None:
    """InputError unless a file can be written there."""
    try:
        if file.is_dir():
            raise InputError(f"{file} is a folder: give the name of a file in it")
        parent = next(p for p in file.absolute().parents if p.exists())
        Path(tempfile.mkdtemp(prefix=f".{file.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; give another path") from error
