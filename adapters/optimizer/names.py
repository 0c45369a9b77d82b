"""The parameter at each position of an optimizer's state, and how certain the assignment is."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from funcprobe.types import InputError, Params

from ..machine.versions import version
from .groupings import Grouping, groupings
from .saved import TORCH, TRAINER, Saved, joined, number, shaped, some
from .sidecar import FORMAT, VERSION, Sidecar, named_by

FOREIGN = "this state belongs to another adapter, or has another order"


class Names(NamedTuple):
    """A name for each key of the saved groups, frozen parameters included."""

    groups: list[list[str]]
    format: str
    route: str
    positional: bool
    twins: tuple[str, ...]  # if by position: registry parameters that share their shape with another
    no_decay: frozenset[int]  # groups of parameters that the Trainer excludes from weight decay


def name_keys(saved: Saved, model: torch.nn.Module, params: Params, sidecar: Sidecar | None) -> Names:
    """Names from the state itself, else from its sidecar, else by replaying the order of trainers.

    The replays (`groupings.py`) are distinguished by the sizes of the groups, by where weight decay is
    0, and by the shapes of the moments. Raises InputError if none matches, or several.
    """
    saved_names = _saved_names(saved)
    if saved_names is not None and sidecar is not None:
        _require_same_names(saved_names[1], sidecar)
    if saved_names is None and sidecar is not None:
        named = [[_unwrapped(n) for n in names] for names in named_by(sidecar, saved)]
        saved_names = (f"by name ({sidecar.path.name})", named)
    if saved_names is not None:
        route, named = saved_names
        no_decay = _without_decay(named, params, _decay_names(model))
        return Names(named, saved.format, route, False, (), no_decay)
    return _replayed(saved, model, params)


def _saved_names(saved: Saved) -> tuple[str, list[list[str]]] | None:
    """Route and names, if the state itself has names."""
    if saved.by_name:
        named = [[_unwrapped(key) for key in group["params"]] for group in saved.groups]
        return "by name (the file's keys)", named
    if not any("param_names" in group for group in saved.groups):
        return None
    given = [group.get("param_names") for group in saved.groups]
    sizes = [len(group["params"]) for group in saved.groups]
    if [len(n) if isinstance(n, list) else None for n in given] != sizes:
        raise InputError("param_names and params of a group differ in length: the file is damaged")
    return "by name (param_names)", [[_unwrapped(n) for n in names or ()] for names in given]


def _require_same_names(named: list[list[str]], sidecar: Sidecar) -> None:
    """InputError unless the sidecar, from which the gradient clipping is read, is of this run."""
    there = {_unwrapped(name) for names in sidecar.names for name in names}
    if other := there ^ {name for names in named for name in names}:
        raise InputError(
            f"{sidecar.path.name} beside it and the names in the state differ, as in {min(other)}: the "
            "sidecar belongs to another run; delete it"
        )


def _replayed(saved: Saved, model: torch.nn.Module, params: Params) -> Names:
    sizes, decay = [len(group["params"]) for group in saved.groups], _decay_names(model)
    known = groupings(model, params, decay)
    fitting = [one for one in known if _fits(saved, one, sizes)]
    # Where sizes leave a choice, shapes decide; where they contradict all, the first states how.
    by_shape = [one for one in fitting if _has_shapes(saved, one, params)]
    if len({str(one.groups) for one in by_shape}) > 1:
        ways = joined(one.what for one in by_shape)
        raise InputError(
            f"groups of {joined(sizes)} tensors fit {ways}, which order them differently: save names "
            "(ParamNamesCallback, or an optimizer built from named_parameters())"
        )
    for one in by_shape or fitting:
        theirs = saved.format == TORCH and one is known[0]
        no_decay = _without_decay(one.groups, params, decay)
        format_ = TRAINER if theirs else saved.format
        route = f"by position, {one.what}"
        return Names(one.groups, format_, route, True, _twins(params), no_decay)
    order = sum(name in params for name, _ in model.named_parameters())
    owner = "adapter" if any("lora_" in name for name in params) else "policy"
    why = FOREIGN
    if sum(sizes) == order:
        why = "no trainer that is known here groups them so"
    raise InputError(
        f"contains {sum(sizes)} tensors in groups of {joined(sizes)}, the {owner} has {order} "
        f"trainable ones ({joined(map(len, known[0].groups))} in the Trainer's groups) of the model's "
        f"{len(list(model.parameters()))}: {why}; give the {owner}'s own state, or save names "
        "(ParamNamesCallback, or an optimizer built from named_parameters())"
    )


def _fits(saved: Saved, grouping: Grouping, sizes: list[int]) -> bool:
    """Whether the groups have these sizes, and no decay where the grouping has none."""
    if [len(names) for names in grouping.groups] != sizes:
        return False
    return not any(
        number(saved.groups[i].get("weight_decay", 0.0), "weight_decay") for i in grouping.undecayed
    )


def _has_shapes(saved: Saved, grouping: Grouping, params: Params) -> bool:
    """Whether every moment has the shape of the parameter at its position."""
    flat = [name for names in grouping.groups for name in names]
    moments = (shaped(saved.state.get(key, {})) for key in saved.keys)
    return all(
        moment is None or (name in params and params[name].shape == moment.shape)
        for name, moment in zip(flat, moments, strict=True)
    )


def _without_decay(groups: list[list[str]], params: Params, decay: set[str]) -> frozenset[int]:
    kept = [[name for name in names if name in params] for names in groups]
    return frozenset(i for i, names in enumerate(kept) if not decay.intersection(names))


def live_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Names:
    """Names by the identity of the optimizer's parameters. InputError for one not in the model."""
    known = {id(p): name for name, p in model.named_parameters()}
    groups = [[known.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    if lost := [
        f"{i} of group {g}" for g, names in enumerate(groups) for i, n in enumerate(names) if not n
    ]:
        raise InputError(
            f"{len(lost)} of the optimizer's parameters are not the model's, as {lost[0]}: give the "
            "model that is trained, without a wrapper that creates parameters of its own"
        )
    return Names(groups, "live optimizer", "by identity", False, (), frozenset())


def sidecar_content(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, packages: Iterable[str], **settings: Any
) -> dict[str, Any]:
    """Content of optimizer_param_names.json: names and shapes of all positions, versions, `settings`.

    InputError for a parameter of the optimizer that is not in the model.
    """
    names = live_names(optimizer, model).groups
    return {
        "format": FORMAT,
        "version": VERSION,
        "optimizer": type(optimizer).__name__,
        "groups": [
            {"names": of_group, "shapes": [list(p.shape) for p in group["params"]]}
            for group, of_group in zip(optimizer.param_groups, names, strict=True)
        ],
        "versions": {package: version(package) for package in packages},
        **settings,
    }


def require_verifiable(names: Names, params: Params, accept_positional: bool) -> None:
    """InputError if only position distinguishes parameters of equal shape, unless that is accepted."""
    if names.twins and not accept_positional:
        raise InputError(
            f"names are {names.route}, not verifiable: {len(names.twins)} of {len(params)} parameters "
            f"share their shape with another (as {some(names.twins, 2)}), so that nothing in the file "
            "shows that the order is correct; save names with ParamNamesCallback, or read it with "
            "accept_positional = True and compare it with a gradient (funcprobe.state_evidence)"
        )


def another_order(saved: Saved, names: Names, params: Params) -> bool:
    """Whether the state has the registry's shapes, equally often, but at other positions."""
    flat = [name for group in names.groups for name in group]
    moments = [shaped(saved.state.get(key, {})) for key in saved.keys]
    found = [() if moment is None else tuple(moment.shape) for moment in moments]
    wanted = Counter(tuple(params[name].shape) for name in flat if name in params)
    return Counter(shape for shape in found if shape) == wanted


def _twins(params: Params) -> tuple[str, ...]:
    shapes = Counter(tuple(t.shape) for t in params.values())
    return tuple(name for name, t in params.items() if shapes[tuple(t.shape)] > 1)


def _decay_names(model: torch.nn.Module) -> set[str]:
    from transformers import Trainer  # slow to import, and needed here only

    # The method does not use `self`, and a Trainer cannot be built without a training run.
    return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]


def _unwrapped(name: object) -> str:
    """The name without prefixes of DistributedDataParallel, FSDP, torch.compile and checkpointing."""
    plain = str(name).removeprefix("module.")
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        plain = plain.replace(wrapper, "")
    return plain
