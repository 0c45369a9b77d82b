"""Learning rates and the other hyper-parameters of a state's groups, the config's where it has any."""

from typing import Any, NamedTuple

from funcprobe.types import AdamGroup, InputError, Params

from .names import Names
from .saved import joined, number


class AdamOverrides(NamedTuple):
    """What the config says in place of the file; None = from the file.

    `lr` is the first group's, the others keep their ratio to it (to its initial_lr, if it is 0).
    `weight_decay` leaves a group without decay (norms, biases) at 0 beside one with decay.
    `checkpoint_step`, in optimizer steps, is used only where the file has no step.
    """

    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    checkpoint_step: int | None = None


class _Kept(NamedTuple):
    """A group that holds something of the registry."""

    place: int  # in the file
    saved: dict[str, Any]
    names: tuple[str, ...]  # of the registry
    hyper: dict[str, float]  # its own numbers; the config's where it has none


def adam_groups(
    groups: list[dict[str, Any]],
    names: Names,
    params: Params,
    overrides: AdamOverrides,
    notes: list[str],
) -> tuple[AdamGroup, ...]:
    """The groups that hold anything of the registry, with the config's numbers where it has any."""
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
                "False), expected AdamW's: train with AdamW, or set weight_decay = 0 to leave it out"
            )
    untold = ["decoupled_weight_decay" not in group.saved for group in kept]
    if any(unknown and group.weight_decay for unknown, group in zip(untold, used, strict=True)):
        notes.append(
            "warning: the file does not say whether weight decay is decoupled (torch says so since "
            "2.7): taken as AdamW's, not Adam's"
        )
    if any("lr" in group.saved for group in kept):
        notes.append(f"lr in the file is the next step's: {joined(g.hyper['lr'] for g in kept)}")
    for key, value in given.items():
        pairs = [(group.hyper[key], getattr(u, key)) for group, u in zip(kept, used, strict=True)]
        if was := {own for own, taken in pairs if own != taken}:
            label, values = key.replace("_", " "), joined(sorted(was))
            notes.append(f"{label} {values} in the file, {value} in the config: the config's is used")
    return tuple(used)


def require_lr_ratio(
    groups: list[dict[str, Any]], names: Names, params: Params, overrides: AdamOverrides
) -> None:
    """InputError where the groups' learning rates in the next step have no ratio to the first's.

    All 0, they have that of initial_lr, if the config gives the first one.
    """
    given = _given(overrides)
    kept = _kept(groups, names, params, given)
    now, rates = [group.hyper["lr"] for group in kept], _rates(kept)
    if any(now):
        if "lr" in given and not now[0]:
            raise InputError(
                "the first group has lr 0 and another has not, so that optimizer.lr has no ratio to "
                "keep: leave out what is not trained, or give a state with equal learning rates"
            )
    elif _untold(kept):
        raise InputError(
            "several groups, all with lr 0 and without initial_lr, so that their ratio in the next "
            "step is not known: give a state saved before the schedule's end"
        )
    elif len(set(rates)) > 1 and (not rates[0] or "lr" not in given):
        raise InputError(
            f"all groups have lr 0 and started from {joined(rates)}, so that their ratio in the next "
            "step is not known: set optimizer.lr, the first group's, to which the others keep theirs"
        )


def live_groups(
    used: tuple[AdamGroup, ...], groups: list[dict[str, Any]], names: Names, params: Params
) -> tuple[AdamGroup, ...]:
    """An optimizer's own groups; where all have lr 0, with initial_lr, which schedules scale.

    The step itself is then nothing, and its direction has the ratio that the next ones will have.
    InputError where there is no ratio to the first group's.
    """
    kept = _kept(groups, names, params, {})
    rates = _rates(kept)
    if not any(group.lr for group in used) and _untold(kept):
        raise InputError(
            "several groups of the optimizer, all with lr 0 and without initial_lr, so that the ratio "
            "of their steps is not known: give it a scheduler of torch.optim, or an lr above 0"
        )
    if any(rates) and not rates[0]:
        raise InputError(
            "the first group of the optimizer has lr 0 and another has not, and the direction is per "
            "unit of the first one's: put a group that moves first"
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
    """Learning rates now; where all are 0, those that the groups start from, or 0.

    That is the start of a warm-up or the end of a schedule, which scales initial_lr.
    """
    rates = [group.hyper["lr"] for group in kept]
    if any(rates):
        return rates
    return [number(group.saved.get("initial_lr", 0.0), "initial_lr") for group in kept]


def _untold(kept: list[_Kept]) -> bool:
    """Whether several groups do not all say what they started from."""
    return len(kept) > 1 and not all("initial_lr" in group.saved for group in kept)


def _of_group(group: dict[str, Any], given: dict[str, float]) -> dict[str, float]:
    """The group's own numbers; the config's where the format keeps none."""
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
            f"{' and '.join(f'optimizer.{key}' for key in wanted)} to what the run used"
        )
    return {
        key: (_beta if key.startswith("beta") else number)(group[key], key)
        if key in group
        else given[key]
        for key in keys
    }


def _beta(value: Any, what: str) -> float:
    return number(value, what, below=1.0)
