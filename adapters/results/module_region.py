"""Where in the adapter a part of the derivative is: the fewest modules that hold half of it."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

HALF = 0.5  # of the part, which a region holds at least
ONE_SIGN = 1.25  # sum of absolute shares over their sum, up to which a fraction of it is said
SPREAD = 0.4  # of the modules: a larger region says nothing


class Found(NamedTuple):
    """Modules by name, and the same in words."""

    name: str
    modules: tuple[str, ...]
    fraction: float


class _Place(NamedTuple):
    stack: str  # the path up to the layer's number
    layer: int | None
    kind: str  # the rest of the path, as mlp.down_proj


def region(value: Mapping[str, float]) -> Found | None:
    """The fewest modules that hold at least half of the values' sum, and not more than all of it.

    Candidates are a single module, and one kind of module (mlp.down_proj), one block (mlp) or all
    modules of adjacent layers. None if that is more than two fifths of the modules, or the sum is 0.
    """
    total = sum(value.values())
    if not total:
        return None
    best: Found | None = None
    for name, modules in _candidates(tuple(value)):
        fraction = sum(value[m] for m in modules) / total
        found = Found(name, modules, fraction)
        if not HALF <= fraction <= 1 or len(modules) > max(1, SPREAD * len(value)):
            continue
        if best is None or (len(modules), -fraction) < (len(best.modules), -best.fraction):
            best = found
    return best


def _candidates(names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    places = {name: _place(name) for name in names}
    stacks = {place.stack for place in places.values() if place.layer is not None}
    for name, place in places.items():
        if place.layer is None:
            yield _short(name), (name,)
    for stack in sorted(stacks):
        inside = {name: place for name, place in places.items() if place.stack == stack}
        layers = sorted({place.layer for place in inside.values() if place.layer is not None})
        of = f" of {_short(stack)}" if len(stacks) > 1 else ""
        for kind in (None, *_kinds(inside.values())):
            chosen = [(n, p.layer) for n, p in inside.items() if kind is None or _is(p.kind, kind)]
            for first, last in itertools.combinations_with_replacement(layers, 2):
                modules = tuple(n for n, k in chosen if k is not None and first <= k <= last)
                if modules:
                    where = _range(first, last, layers) + of
                    yield (f"{kind} of {where}" if kind else where), modules


def _range(first: int, last: int, layers: Sequence[int]) -> str:
    if first == last:
        return f"layer {first}"
    if (first, last) == (layers[0], layers[-1]):
        return "all layers"
    return f"layers {first} to {last}"


def _kinds(places: Iterable[_Place]) -> list[str]:
    """Every kind of module, and what several have in common before a dot."""
    members: dict[str, set[str]] = {}
    for place in places:
        parts = place.kind.split(".")
        for count in range(1, len(parts) + 1):
            members.setdefault(".".join(parts[:count]), set()).add(place.kind)
    return [kind for kind, inside in members.items() if kind in inside or len(inside) > 1]


def _is(kind: str, wanted: str) -> bool:
    return kind == wanted or kind.startswith(f"{wanted}.")


def _place(name: str) -> _Place:
    numbered = re.match(r"(.*?\.)?(\d+)\.(.+)", name)
    if numbered is None:
        return _Place(name, None, name)
    return _Place(numbered[1] or "", int(numbered[2]), numbered[3])


def _short(path: str) -> str:
    """A path without what peft puts before it."""
    return re.sub(r"^(base_model\.|model\.)+", "", path).strip(".") or path
