"""optimizer_param_names.json: the names of an optimizer's positions, written beside its state.

ParamNamesCallback writes it with shapes, versions and the settings of the run; a bare list of names,
a list for each group, or these under `param_names` or `param_name_groups`, as other projects write
them, are read as well.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe.types import InputError

from .saved import Key, Saved, joined, located, number, shaped, some

FILE = "optimizer_param_names.json"
FORMAT, VERSION = "funcprobe.optimizer_param_names", 1


class Sidecar(NamedTuple):
    """What the file says; empty or None where it does not."""

    path: Path
    names: list[list[str]]  # one for each position; a list for each group
    shapes: list[list[list[int]]] | None
    global_step: int | None
    max_grad_norm: float | None
    loss: dict[str, Any]
    sampling: dict[str, Any]
    versions: dict[str, str]


def find_sidecar(state: Path) -> Sidecar | None:
    """The one beside a state's file, or in a state's folder or beside it. InputError if damaged."""
    for folder in [state, state.parent] if state.is_dir() else [state.parent]:
        if (path := folder / FILE).is_file():
            try:
                return _read(path)
            except InputError as error:
                raise located(path, error) from error.__cause__
    return None


def named_by(sidecar: Sidecar, saved: Saved) -> list[list[str]]:
    """A name for each of the state's positions, group by group.

    InputError where the groups' sizes, or a shape, are others than the state's.
    """
    groups: list[list[Key]] = [group["params"] for group in saved.groups]
    sizes = [len(keys) for keys in groups]
    names, shapes = sidecar.names, sidecar.shapes or []
    if len(names) == 1 and len(names[0]) == sum(sizes):  # a flat list, whose groups are the state's
        names = _cut(names[0], sizes)
        shapes = _cut(shapes[0], sizes) if shapes else []
    if [len(n) for n in names] != sizes:
        raise InputError(
            f"{FILE} beside it names groups of {joined(map(len, names))} parameters, the state has "
            f"{joined(sizes)}: it is of another optimizer; delete it, or copy the right one"
        )
    for keys, group, part in zip(groups, names, shapes, strict=bool(shapes)):
        for key, name, shape in zip(keys, group, part, strict=True):
            moment = shaped(saved.state.get(key, {}))
            if moment is not None and list(moment.shape) != list(shape):
                raise InputError(
                    f"{FILE} beside it says that {name} has shape {tuple(shape)}, position {key} of "
                    f"the state has {tuple(moment.shape)}: one of the two is of another checkpoint"
                )
    return names


def _cut(flat: list[Any], sizes: list[int]) -> list[list[Any]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _read(path: Path) -> Sidecar:
    cure = "delete it, or write it again with ParamNamesCallback"
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read as JSON ({type(error).__name__}): {cure}") from error
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    if ours and content.get("version") != VERSION:
        raise InputError(f"is of version {content.get('version')!r:.20}, expected {VERSION}: {cure}")
    if ours:
        groups = content.get("groups")
        formed = isinstance(groups, list) and all(
            isinstance(g, dict) and _lists_of(g.get("names"), str) for g in groups
        )
        names = [g["names"] for g in groups] if formed else None
    else:
        names = content
        for key in ("param_names", "param_name_groups"):
            names = content.get(key, names) if isinstance(content, dict) else names
        names = [names] if _lists_of(names, str) else names
    if not isinstance(names, list) or not any(names) or not all(_lists_of(n, str) for n in names):
        raise InputError(f"has no lists of names: {cure}")
    count = Counter(name for group in names for name in group)
    if twice := [name for name, times in count.items() if times > 1]:
        raise InputError(f"names {some(twice)} twice: {cure}")
    said = content if ours else {}
    return Sidecar(
        path=path,
        names=names,
        shapes=_shapes(said["groups"], names, cure) if ours else None,
        global_step=_typed(said, "global_step", (int,), None, cure),
        max_grad_norm=_bound(said, cure),
        loss=_typed(said, "loss", (dict,), {}, cure),
        sampling=_typed(said, "sampling", (dict,), {}, cure),
        versions=_typed(said, "versions", (dict,), {}, cure),
    )


def _shapes(groups: list[Any], names: list[list[str]], cure: str) -> list[list[list[int]]]:
    shapes = [group.get("shapes") for group in groups]
    for one, group in zip(shapes, names, strict=True):
        formed = isinstance(one, list) and len(one) == len(group)
        if not formed or not all(_lists_of(shape, int) for shape in one):
            raise InputError(f"has no shape for each name: {cure}")
    return shapes


def _bound(said: dict[str, Any], cure: str) -> float | None:
    bound = _typed(said, "max_grad_norm", (int, float), None, cure)
    try:
        return None if bound is None else number(bound, "max_grad_norm")
    except InputError as error:
        raise InputError(f"{error} (0 is off): {cure}") from error


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _typed(said: dict[str, Any], key: str, kinds: tuple[type, ...], default: Any, cure: str) -> Any:
    value = said.get(key)
    if value is None:
        return default
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise InputError(f"{key} is {value!r:.80}, expected {kinds[-1].__name__}: {cure}")
    return value


def _lists_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
