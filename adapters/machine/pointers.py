"""Git LFS pointers: small texts in place of files whose content was never downloaded."""

from pathlib import Path

from funcprobe.types import InputError

_START = b"version https://git-lfs.github.com/spec/"  # of every pointer; the specification's first line


def pointer(place: Path, *patterns: str) -> InputError | None:
    """The error for a file that is a pointer, or for the first in a folder, of `patterns` if given.

    None if there is none. To be raised where reading has failed: a folder may contain pointers that
    nobody reads.
    """
    try:
        inside = (path for pattern in patterns or ("**/*",) for path in sorted(place.glob(pattern)))
        files = inside if place.is_dir() else iter((place,))
        found = next((path for path in files if path.is_file() and _is_pointer(path)), None)
    except OSError:  # the reader's own error says what is wrong
        return None
    if found is None:
        return None
    return InputError(
        f"{found} is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
    )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_START)) == _START
