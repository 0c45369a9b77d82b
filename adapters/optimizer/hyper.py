"""Learning rates and the other hyper-parameters of a state's groups, the config's where it has any."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from funcprobe.types import AdamGroup, InputError, Params

from .names import Names
from .saved import number


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


def adam_groups(
    groups: list[dict[str, Any]],
    names: Names,
    params: Params,
    overrides: AdamOverrides,
    notes: list[str],
) -> tuple[AdamGroup, ...]:
    """The groups that hold anything of the registry, with the config's numbers where it has any."""
    given = {k: v for k, v in overrides._asdict().items() if v is not None and k != "checkpoint_step"}
    kept = [
        (i, group, names_)
        for i, (group, all_) in enumerate(zip(groups, names.groups, strict=True))
        if (names_ := tuple(name for name in all_ if name in params))
    ]
    found = [_of_group(group, given) for _, group, _ in kept]
    rates = [hyper["lr"] for hyper in found]
    if not any(rates):  # the start of a warm-up or the end of a schedule, which scales initial_lr
        rates = _initial(kept, given)
    elif "lr" in given and not rates[0]:
        raise InputError(
            "the first group has lr 0 and another has not, so that optimizer.lr has no ratio to keep: "
            "leave out what is not trained, or give a state with equal learning rates"
        )
    decaying = any(hyper["weight_decay"] for hyper in found)
    used = []
    for (i, group, names_), hyper, rate in zip(kept, found, rates, strict=True):
        new = dict(given)
        if "lr" in new:
            new["lr"] *= rate / rates[0] if rates[0] else 1.0
        if not hyper["weight_decay"] and (decaying or i in names.no_decay):
            new.pop("weight_decay", None)
        used.append(AdamGroup(names_, **hyper | new))
        if used[-1].weight_decay and group.get("decoupled_weight_decay", True) is not True:
            raise InputError(
                "torch.optim.Adam with weight decay inside the gradient (decoupled_weight_decay = "
                "False), expected AdamW's: train with AdamW, or set weight_decay = 0 to leave it out"
            )
    untold = ["decoupled_weight_decay" not in group for _, group, _ in kept]
    if any(unknown and group.weight_decay for unknown, group in zip(untold, used, strict=True)):
        notes.append(
            "warning: the file does not say whether weight decay is decoupled (torch says so since "
            "2.7): taken as AdamW's, not Adam's"
        )
    if any("lr" in group for _, group, _ in kept):
        notes.append(f"lr in the file is the next step's: {_and(hyper['lr'] for hyper in found)}")
    for key, value in given.items():
        if was := {f[key] for f, u in zip(found, used, strict=True) if f[key] != getattr(u, key)}:
            label, values = key.replace("_", " "), _and(sorted(was))
            notes.append(f"{label} {values} in the file, {value} in the config: the config's is used")
    return tuple(used)


def _initial(
    kept: list[tuple[int, dict[str, Any], tuple[str, ...]]], given: dict[str, float]
) -> list[float]:
    """Learning rates that groups start from, where all are 0 now. InputError if they have no ratio."""
    known = ["initial_lr" in group for _, group, _ in kept]
    rates = [number(group.get("initial_lr", 0.0), "initial_lr") for _, group, _ in kept]
    if len(kept) > 1 and not all(known):
        raise InputError(
            "several groups, all with lr 0 and without initial_lr, so that their ratio in the next "
            "step is not known: give a state saved before the schedule's end"
        )
    if len(set(rates)) > 1 and (not rates[0] or "lr" not in given):
        raise InputError(
            f"all groups have lr 0 and started from {_and(rates)}, so that their ratio in the next "
            "step is not known: set optimizer.lr, the first group's, to which the others keep theirs"
        )
    return rates


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


def _and(values: Iterable[object]) -> str:
    return " and ".join(map(str, values))
