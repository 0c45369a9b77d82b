"""Learning rates and other hyper-parameters of a state's groups, replaced by those of the config."""

from typing import Any, NamedTuple

from funcprobe.types import AdamGroup, InputError, Params

from .names import Names
from .saved import joined, number


class AdamOverrides(NamedTuple):
    """Values of the config that replace the file's; None: the file's.

    `lr` is the first group's, the others keep their ratio to it (to its initial_lr, if it is 0).
    `weight_decay` does not apply to a group without decay (norms, biases) if another group has decay.
    `checkpoint_step`, in optimizer steps, is used only if the file has no step.
    """

    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    checkpoint_step: int | None = None


class _Kept(NamedTuple):
    """A group that contains parameters of the registry."""

    place: int  # index in the file
    saved: dict[str, Any]
    names: tuple[str, ...]  # of the registry
    hyper: dict[str, float]  # its own values; the config's where it has none


def adam_groups(
    groups: list[dict[str, Any]],
    names: Names,
    params: Params,
    overrides: AdamOverrides,
    notes: list[str],
) -> tuple[AdamGroup, ...]:
    """The groups that contain parameters of the registry, with the config's values where it has any."""
    given = _given(overrides)
    kept = _kept(groups, names, params, given)
    rates = _rates(kept)
    decaying = any(group.hyper["weight_decay"] for group in kept)
    used = []
    for group, rate in zip(kept, rates, strict=True):
        new = dict(given)
        if "lr" in new:
            new["lr"] *= rate / rates[0] if rates[0] else 1.0
        if not group.hyper["weight_decay"] and (decaying or group.place in names.no_decay):
            new.pop("weight_decay", None)
        used.append(AdamGroup(group.names, **group.hyper | new))
        if used[-1].weight_decay and group.saved.get("decoupled_weight_decay", True) is not True:
            raise InputError(
                "torch.optim.Adam with weight decay inside the gradient (decoupled_weight_decay = "
                "False), expected AdamW's: train with AdamW, or set weight_decay = 0 to omit it"
            )
    unrecorded = ["decoupled_weight_decay" not in group.saved for group in kept]
    if any(unknown and group.weight_decay for unknown, group in zip(unrecorded, used, strict=True)):
        notes.append(
            "warning: the file does not record whether weight decay is decoupled (torch does since "
            "2.7): assumed decoupled, as in AdamW"
        )
    if any("lr" in group.saved for group in kept):
        notes.append(f"lr of the next step, in the file: {joined(g.hyper['lr'] for g in kept)}")
    for key, value in given.items():
        pairs = [(group.hyper[key], getattr(u, key)) for group, u in zip(kept, used, strict=True)]
        if was := {own for own, taken in pairs if own != taken}:
            label, values = key.replace("_", " "), joined(sorted(was))
            notes.append(f"{label} {values} in the file, {value} in the config: the config's is used")
    return tuple(used)


def require_lr_ratio(
    groups: list[dict[str, Any]], names: Names, params: Params, overrides: AdamOverrides
) -> None:
    """InputError if the groups' learning rates in the next step have no ratio to the first group's.

    If all are 0, the ratio is that of initial_lr, provided that the config sets the first one.
    """
    given = _given(overrides)
    kept = _kept(groups, names, params, given)
    now, rates = [group.hyper["lr"] for group in kept], _rates(kept)
    if any(now):
        if "lr" in given and not now[0]:
            raise InputError(
                "the first group has learning rate 0 and another does not, so that optimizer.lr has no "
                "ratio to keep: omit groups that are not trained, or give a state with equal rates"
            )
    elif _no_initial_lr(kept):
        raise InputError(
            "several groups, all with lr 0 and without initial_lr, so that their ratio in the next "
            "step is unknown: give a state saved before the end of the schedule"
        )
    elif len(set(rates)) > 1 and (not rates[0] or "lr" not in given):
        raise InputError(
            f"all groups have lr 0 and started from {joined(rates)}, so that their ratio in the next "
            "step is unknown: set optimizer.lr, the first group's; the others keep their ratio to it"
        )


def live_groups(
    used: tuple[AdamGroup, ...], groups: list[dict[str, Any]], names: Names, params: Params
) -> tuple[AdamGroup, ...]:
    """The groups of an optimizer in use; if all have lr 0, with initial_lr, which schedules scale.

    The step itself is then 0, and its direction has the ratios of the following steps. InputError if
    there is no ratio to the first group's.
    """
    kept = _kept(groups, names, params, {})
    rates = _rates(kept)
    if not any(group.lr for group in used) and _no_initial_lr(kept):
        raise InputError(
            "several groups of the optimizer, all with lr 0 and without initial_lr, so that the ratio "
            "of their steps is unknown: use a scheduler of torch.optim, or a learning rate above 0"
        )
    if any(rates) and not rates[0]:
        raise InputError(
            "the first group of the optimizer has learning rate 0 and another does not, but the "
            "direction is per unit of the first one's: place a group with a learning rate above 0 first"
        )
    return tuple(group._replace(lr=rate) for group, rate in zip(used, rates, strict=True))


def _given(overrides: AdamOverrides) -> dict[str, float]:
    return {k: v for k, v in overrides._asdict().items() if v is not None and k != "checkpoint_step"}


def _kept(
    groups: list[dict[str, Any]], names: Names, params: Params, given: dict[str, float]
) -> list[_Kept]:
    return [
        _Kept(i, group, of_registry, _of_group(group, given))
        for i, (group, all_) in enumerate(zip(groups, names.groups, strict=True))
        if (of_registry := tuple(name for name in all_ if name in params))
    ]


def _rates(kept: list[_Kept]) -> list[float]:
    """Current learning rates; if all are 0, each group's initial_lr, or 0 without one.

    All are 0 at the start of a warm-up or the end of a schedule, which scales initial_lr.
    """
    rates = [group.hyper["lr"] for group in kept]
    if any(rates):
        return rates
    return [number(group.saved.get("initial_lr", 0.0), "initial_lr") for group in kept]


def _no_initial_lr(kept: list[_Kept]) -> bool:
    """Whether there are several groups, of which one or more have no initial_lr."""
    return len(kept) > 1 and not all("initial_lr" in group.saved for group in kept)


def _of_group(group: dict[str, Any], given: dict[str, float]) -> dict[str, float]:
    """The group's own values; the config's where the format stores none."""
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise InputError(f"betas are {betas!r:.80}, expected two numbers")
        group = group | {"beta1": betas[0], "beta2": betas[1]}
    keys = ("lr", "beta1", "beta2", "eps", "weight_decay")
    if missing := [key for key in keys if key not in group and key not in given]:
        wanted = sorted({"betas" if key.startswith("beta") else key for key in missing})
        raise InputError(
            f"has a group without {', '.join(wanted)}: set "
            f"{' and '.join(f'optimizer.{key}' for key in wanted)} as in training"
        )
    return {
        key: (_beta if key.startswith("beta") else number)(group[key], key)
        if key in group
        else given[key]
        for key in keys
    }


def _beta(value: Any, what: str) -> float:
    return number(value, what, below=1.0)
