"""JSON as every reader here takes it: what Python's parser would accept silently is rejected."""

import json
import re
from collections.abc import Callable
from typing import Any

DEEPEST = 100  # lists and objects within each other


def parse(text: str, *, nan: bool = False) -> Any:
    """The value of a JSON text. `nan`: NaN and infinities, which Python writes, are numbers.

    Raises ValueError, with a reason in one line, for text that is not JSON, keys that occur twice or
    are not Unicode text, numbers of too many digits, and structures that are too deep.
    """
    number: Callable[[str], float] = float if nan else _no_number
    try:
        found = json.loads(text, parse_constant=number, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if text.count("[") + text.count("{") > DEEPEST:
        require_shallow(found)
    return found


def require_shallow(value: Any) -> None:
    """ValueError for lists and objects of more than `DEEPEST` levels.

    Parsers stop near a thousand; what walks through their result later, or writes it, would stop at
    fewer, with another exception.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            part
            for one in level
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} deep")


def is_text(value: Any) -> bool:
    """Whether this is Unicode text; JSON can contain half a surrogate pair, other files cannot."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if bad := [name for name in found if not is_text(name)]:
        raise ValueError(f"key {bad[0]!a} is not Unicode text")
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r:.60} occurs twice")
    return found
