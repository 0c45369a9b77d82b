"""optimizer_param_names.json: the names of an optimizer's positions, written beside its state.

ParamNamesCallback writes it with shapes, versions and the settings of the run. A plain list of names, a
list for each group, or these under `param_names` or `param_name_groups`, as other projects write them,
are read as well.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe.types import InputError

from .. import strict_json
from .saved import Key, Saved, joined, located, number, shaped, some

FILE = "optimizer_param_names.json"
FORMAT, VERSION = "funcprobe.optimizer_param_names", 1


class Sidecar(NamedTuple):
    """Content of the file; empty or None where the file has no value."""

    path: Path
    names: list[list[str]]  # one for each position; a list for each group
    shapes: list[list[list[int]]] | None
    global_step: int | None
    max_grad_norm: float | None
    loss: dict[str, Any]
    sampling: dict[str, Any]
    versions: dict[str, str]


def find_sidecar(state: Path) -> Sidecar | None:
    """The sidecar beside a state's file, or in or beside a state's folder. InputError if damaged."""
    for folder in [state, state.parent] if state.is_dir() else [state.parent]:
        if (path := folder / FILE).is_file():
            try:
                return _read(path)
            except InputError as error:
                raise located(path, error) from error.__cause__
    return None


def named_by(sidecar: Sidecar, saved: Saved) -> list[list[str]]:
    """A name for each of the state's positions, group by group.

    InputError if the sizes of the groups, or a shape, differ from the state's.
    """
    groups: list[list[Key]] = [group["params"] for group in saved.groups]
    sizes = [len(keys) for keys in groups]
    names, shapes = sidecar.names, sidecar.shapes or []
    if len(names) == 1 and len(names[0]) == sum(sizes):  # a flat list, split into the state's groups
        names = _cut(names[0], sizes)
        shapes = _cut(shapes[0], sizes) if shapes else []
    if [len(n) for n in names] != sizes:
        raise InputError(
            f"{FILE} beside it has groups of {joined(map(len, names))} parameters, the state has "
            f"{joined(sizes)}: it belongs to another optimizer; delete it, or copy the correct one"
        )
    for keys, group, part in zip(groups, names, shapes, strict=bool(shapes)):
        for key, name, shape in zip(keys, group, part, strict=True):
            moment = shaped(saved.state.get(key, {}))
            if moment is not None and list(moment.shape) != list(shape):
                raise InputError(
                    f"{FILE} beside it gives {name} shape {tuple(shape)}, position {key} of the state "
                    f"has {tuple(moment.shape)}: one of the two belongs to another checkpoint"
                )
    return names


def _cut(flat: list[Any], sizes: list[int]) -> list[list[Any]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _read(path: Path) -> Sidecar:
    remedy = "delete it, or write it again with ParamNamesCallback"
    try:
        content = strict_json.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON ({error}): {remedy}") from error
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    if ours and content.get("version") != VERSION:
        raise InputError(f"has version {content.get('version')!r:.20}, expected {VERSION}: {remedy}")
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
        raise InputError(f"contains no lists of names: {remedy}")
    count = Counter(name for group in names for name in group)
    if twice := [name for name, times in count.items() if times > 1]:
        raise InputError(f"lists {some(twice)} twice: {remedy}")
    fields = content if ours else {}
    return Sidecar(
        path=path,
        names=names,
        shapes=_shapes(fields["groups"], names, remedy) if ours else None,
        global_step=_typed(fields, "global_step", (int,), None, remedy),
        max_grad_norm=_bound(fields, remedy),
        loss=_typed(fields, "loss", (dict,), {}, remedy),
        sampling=_typed(fields, "sampling", (dict,), {}, remedy),
        versions=_typed(fields, "versions", (dict,), {}, remedy),
    )


def _shapes(groups: list[Any], names: list[list[str]], remedy: str) -> list[list[list[int]]]:
    shapes = [group.get("shapes") for group in groups]
    for one, group in zip(shapes, names, strict=True):
        formed = isinstance(one, list) and len(one) == len(group)
        if not formed or not all(_lists_of(shape, int) for shape in one):
            raise InputError(f"does not have one shape for each name: {remedy}")
    return shapes


def _bound(fields: dict[str, Any], remedy: str) -> float | None:
    bound = _typed(fields, "max_grad_norm", (int, float), None, remedy)
    try:
        return None if bound is None else number(bound, "max_grad_norm")
    except InputError as error:
        raise InputError(f"{error} (0 is off): {remedy}") from error


def _typed(fields: dict[str, Any], key: str, kinds: tuple[type, ...], default: Any, remedy: str) -> Any:
    value = fields.get(key)
    if value is None:
        return default
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise InputError(f"{key} is {value!r:.80}, expected {kinds[-1].__name__}: {remedy}")
    return value


def _lists_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
