"""Regular expressions in adapter_config.json, which peft matches with the name of every module.

Python's `re` takes exponentially long for some, such as (a+)+b, and cannot be interrupted.
"""

import re
from re import _constants as constants  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from funcprobe.types import InputError

MOST_REPEATS = 5  # unbounded ones that a match can pass; names have about 60 characters
MOST_LAYERS = 1_000  # models have some hundreds; each takes some milliseconds to build
LONGEST = 2_000  # characters

_LISTS = ("target_modules", "exclude_modules", "target_parameters", "layers_pattern", "modules_to_save")
_KEYS = ("rank_pattern", "alpha_pattern")
_REPEATS = (constants.MAX_REPEAT, constants.MIN_REPEAT)


def require_quick(found: dict[str, Any], source: str) -> None:
    """InputError for a pattern that may match without end, and for a layer_replication without end."""
    given = [(key, found[key]) for key in _LISTS if isinstance(found.get(key), str)]
    given += [(key, name) for key in _KEYS if isinstance(found.get(key), dict) for name in found[key]]
    for key, pattern in given:
        if why := _why_slow(pattern):
            raise InputError(
                f"{source}: adapter_config.json has a pattern in {key}, {pattern!r:.80}, that {why}: "
                "write the names of the modules as a list"
            )
    spans = found.get("layer_replication")
    if isinstance(spans, list):
        pairs = [
            x for x in spans if isinstance(x, list) and len(x) == 2 and all(type(n) is int for n in x)
        ]
        if sum(max(0, end - start) for start, end in pairs) > MOST_LAYERS:
            raise InputError(
                f"{source}: adapter_config.json has a layer_replication of more than {MOST_LAYERS:,} "
                "layers: it is damaged"
            )


def _why_slow(pattern: str) -> str | None:
    if len(pattern) > LONGEST:
        return f"has {len(pattern)} characters, more than {LONGEST:,}"
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError, ValueError):
        return None if len(pattern) < LONGEST else "cannot be read"  # peft's error says what is wrong
    repeats, nested = _repeats(tree, inside=False)
    if nested:
        return "repeats a repetition, which can take exponentially long"
    if repeats > MOST_REPEATS:
        return f"has {repeats} repetitions in a row, more than {MOST_REPEATS}"
    return None


def _repeats(tree: Any, *, inside: bool) -> tuple[int, bool]:
    """The most unbounded repetitions on a way through a pattern; whether one is within another."""
    total, nested = 0, False
    for operation, argument in tree:
        if operation in _REPEATS:
            _, most, part = argument
            many = most > 16
            count, below = _repeats(part, inside=inside or many)
            total, nested = total + count + many, nested or below or (many and inside)
        elif operation is constants.BRANCH:
            ways = [_repeats(part, inside=inside) for part in argument[1]]
            total += max((count for count, _ in ways), default=0)
            nested = nested or any(below for _, below in ways)
        else:
            for part in _parts(argument):
                count, below = _repeats(part, inside=inside)
                total, nested = total + count, nested or below
    return total, nested


def _parts(argument: Any) -> list[Any]:
    """The patterns within a group, an assertion or a conditional."""
    if isinstance(argument, parser.SubPattern):
        return [argument]
    if isinstance(argument, tuple):
        return [part for part in argument if isinstance(part, parser.SubPattern)]
    return []
