"""TOML as every reader here takes it: tomllib, whose failures are all one ValueError."""

import tomllib
from typing import Any

from ..strict_json import require_shallow


def parse(text: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises ValueError, with a reason in one line, for text that is not TOML, numbers of too many digits,
    and structures that are too deep.
    """
    try:
        found = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    require_shallow(found)
    return found
