"""Structures that go wrong: a JSON value, of which a part is replaced, removed, repeated or nested.

Half of them keep the types, so that they pass a check of structure and reach what comes after it.
"""

import json
import random
from collections.abc import Callable
from typing import Any

NAMES = ("a\x1b[31mred\x1b[0m", "[bold]x[/bold]", "a\nb\rc", "\u202eevil", "\ud800", "", "__class__")
PATHS = ("../../../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000, "~nobody/x", "/dev/zero", ".")
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *NAMES,
    *PATHS,
    *([], {}, [[]], [{}], {"": {}}, [None], [0] * 300, "0", "1e999", "nan", "1" * 5000),
)


def mutated(data: bytes, seed: int, hostile: tuple[Any, ...] = HOSTILE) -> bytes:
    """Another structure, near the one whose JSON text `data` is; the same for the same seed."""
    chance = random.Random(seed)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = chance.choice(hostile)
    alike = chance.random() < 0.5
    for _ in range(chance.randint(1, 3)):
        value = _alike(value, chance) if alike else _changed(value, chance, hostile)
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):  # an integer of too many digits
        return data


def _changed(value: Any, chance: random.Random, hostile: tuple[Any, ...]) -> Any:
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return _instead(value, chance, hostile)
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = chance.random()
    copy = dict(value) if isinstance(value, dict) else list(value)
    if how < 0.7:
        copy[key] = _changed(value[key], chance, hostile)
    elif how < 0.8:
        del copy[key]
    elif isinstance(copy, list):
        copy.insert(key, chance.choice((value[key], chance.choice(hostile))))
    else:
        name = chance.choice((*NAMES, key, "x"))
        copy[name] = chance.choice((value[key], chance.choice(hostile)))
    return copy


def _alike(value: Any, chance: random.Random) -> Any:
    """With one part replaced by another of its type or by null, or in a list left out or repeated."""
    if not isinstance(value, dict | list) or not value:
        return _of_its_type(value, chance)
    if isinstance(value, list) and chance.random() < 0.3:
        at = chance.randrange(len(value))
        return chance.choice(
            ([], value[:at], value[at:], [*value[:at], *value[at:][:1] * 2, *value[at:]])
        )
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = None if chance.random() < 0.05 else _alike(value[key], chance)
    return copy


def _of_its_type(value: Any, chance: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((0, 1, -1, value + 1, -value, value * 1000, 2**31, 2**53, 2**63))
    if isinstance(value, float):
        return chance.choice((0.0, -value, value * 1e3, value * 1e-3, 1.0, 1e308, -1e308, 5e-324))
    if isinstance(value, str):
        return chance.choice((*NAMES, "x" * 5000, value + chance.choice(NAMES), "<script>", "x"))
    return chance.choice((0.5, 1, "x", [], {})) if value is None else value


def _instead(value: Any, chance: random.Random, hostile: tuple[Any, ...]) -> Any:
    ways: list[Callable[[], Any]] = [lambda: chance.choice(hostile), lambda: _near(value, chance)]
    if chance.random() < 0.05:
        return _nested(value, chance.choice((3, 40, 400)))
    return chance.choice(ways)()


def _near(value: Any, chance: random.Random) -> Any:
    if isinstance(value, str):
        at = chance.randint(0, len(value))
        return value[:at] + chance.choice((*NAMES, "-", ".", "(", "*", "9", ",", ":", " ")) + value[at:]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return chance.choice((value + 1, value - 1, -value, value * 1000, str(value), [value]))
    return chance.choice(([value], {"x": value}, str(value)[:200]))


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value
