"""Orders of parameters other than the assumed one, which a state without names could have."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer, in a parameter's name
LORA = re.compile(r"lora_(embedding_)?[AB]")

Pairing = dict[str, str]
"""name -> the name under which its state is filed if the order is another."""


class _Place(NamedTuple):
    """A parameter's layer and kind, which is its name without the layer, in the assumed order."""

    name: str
    layer: str  # "" outside the layers
    kind: str
    factor: str  # "lora_A", "lora_B" or ""
    module: str  # the kind without its factor
    layer_rank: int  # by first occurrence
    module_rank: int


def other_orders(groups: Sequence[Sequence[str]], shapes: Mapping[str, Any]) -> dict[str, Pairing]:
    """{description: pairing} of every other order with the same shape at every position.

    `groups` are the names in the assumed order, group by group. Included: layers in the order of their
    numbers as text (0, 1, 10, 11, 2, ...), reversed, or shifted by one; modules of a layer in
    alphabetical or reversed order, or module by module over all layers; names sorted as text; lora_B
    before lora_A, all lora_A before all lora_B; the groups in another order; and every exchange of two
    kinds of modules in all layers, or of two layers.
    """
    order = [name for group in groups for name in group if name in shapes]
    places = _places(order)
    found: dict[str, Pairing] = {}
    seen = {tuple(order)}

    def consider(what: str, pairing: Pairing) -> None:
        filed = tuple(pairing[name] for name in order)
        fits = all(shapes[name] == shapes[other] for name, other in pairing.items())
        if fits and filed not in seen and len(set(filed)) == len(filed):
            seen.add(filed)
            found[what] = pairing

    for what, key in _SORTINGS.items():
        actual = [p.name for group in _by_group(groups, places) for p in sorted(group, key=key)]
        consider(what, dict(zip(actual, order, strict=True)))
    if len(groups) > 1:
        actual = [name for group in reversed(groups) for name in group if name in shapes]
        consider("the groups reversed", dict(zip(actual, order, strict=True)))
    layers = list(dict.fromkeys(p.layer for p in places if p.layer))
    by_layer = {layer: {p.kind: p.name for p in places if p.layer == layer} for layer in layers}
    if len(layers) > 1:
        shifted = dict(zip(layers, layers[1:] + layers[:1], strict=True))
        consider("the layers shifted by one", _exchange(places, by_layer, shifted))
    for a, b in combinations(layers, 2):
        consider(f"layers {a} and {b} exchanged", _exchange(places, by_layer, {a: b, b: a}))
    by_module = {(p.module, p.factor, p.layer): p.name for p in places}
    for a, b in combinations(dict.fromkeys(p.module for p in places), 2):
        swap = {a: b, b: a}
        pairing = {
            p.name: by_module.get((swap.get(p.module, p.module), p.factor, p.layer), p.name)
            for p in places
        }
        consider(f"{_short(a)} and {_short(b)} exchanged", pairing)
    return found


_SORTINGS: dict[str, Callable[[_Place], Any]] = {
    "the names sorted as text": lambda p: p.name,
    "the layers in the order of their numbers as text": lambda p: (p.layer, p.module_rank),
    "the layers reversed": lambda p: (-p.layer_rank, p.module_rank),
    "the modules of a layer in alphabetical order": lambda p: (p.layer_rank, p.module, p.factor),
    "the modules of a layer reversed": lambda p: (p.layer_rank, -p.module_rank, p.factor),
    "module by module over all layers": lambda p: (p.module_rank, p.layer_rank),
    "lora_B before lora_A": lambda p: (p.layer_rank, p.module_rank, _backwards(p.factor)),
    "all lora_A before all lora_B": lambda p: p.factor,
    "all lora_B before all lora_A": lambda p: _backwards(p.factor),
}


def _places(order: Sequence[str]) -> list[_Place]:
    layers: dict[str, int] = {}
    modules: dict[str, int] = {}
    places = []
    for name in order:
        index = INDEX.search(name)
        layer = index[0] if index else ""
        kind = name if index is None else f"{name[: index.start()]}*{name[index.end() :]}"
        factor = found[0] if (found := LORA.search(kind)) else ""
        module = kind.replace(factor, "*") if factor else kind
        layer_rank = layers.setdefault(layer, len(layers))
        module_rank = modules.setdefault(module, len(modules))
        places.append(_Place(name, layer, kind, factor, module, layer_rank, module_rank))
    return places


def _by_group(groups: Sequence[Sequence[str]], places: list[_Place]) -> list[list[_Place]]:
    by_name = {p.name: p for p in places}
    return [[by_name[name] for name in group if name in by_name] for group in groups]


def _exchange(places: list[_Place], by_layer: dict[str, dict[str, str]], to: dict[str, str]) -> Pairing:
    return {p.name: by_layer.get(to.get(p.layer, p.layer), {}).get(p.kind, p.name) for p in places}


def _backwards(text: str) -> list[int]:
    return [-ord(c) for c in text]


def _short(module: str) -> str:
    """The last components of a module's name that say which it is."""
    parts = [part for part in module.split(".") if part not in {"*", "default", "weight", "bias"}]
    return parts[-1] if parts else module
