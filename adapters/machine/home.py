"""A path that begins with ~, the home of a user."""

import os
from pathlib import Path

from funcprobe.types import InputError


def expanded(path: Path | str) -> Path:
    """~/x and ~user/x with the user's home in place of ~; any other path as it is.

    Raises:
        InputError: there is no such user. Path.expanduser raises RuntimeError, and os.path.expanduser
            leaves the name, of which a folder would be made.
    """
    text = os.fspath(path)
    try:
        found = os.path.expanduser(text)
    except ValueError:  # a name with a NUL
        found = text
    if found.startswith("~"):
        name = text[1:].partition("/")[0]
        raise InputError(f"{path}: this machine has no user {name!r}: give the whole path")
    return Path(found)
