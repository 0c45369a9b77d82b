"""Adam's state from a training run's file, attached to the registry by name."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcprobe.types import AdamGroup, AdamState, InputError, Params

from .optimizer_file import EXPECTED, Entries, Groups, load_entries, located, number, some


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


class OptimizerReport(NamedTuple):
    """How the state was attached: for the reader of the results, not for computing."""

    path: Path
    format: str  # "Hugging Face Trainer" or "torch.optim"
    route: str
    positional: bool  # True: the order rests on the replay, equal shapes cannot be told apart
    parameters: int  # in the registry
    coverage: dict[str, int]  # of them, how many have exp_avg_sq, exp_avg, step in the file
    notes: tuple[str, ...]


_FROM_FILE = AdamOverrides()
_TRAINER, _TORCH = "Hugging Face Trainer", "torch.optim"
_BY_NAME = "by name (param_names)"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FOREIGN = "this state is of another adapter or another order"


def read_adam_state(
    path: Path,
    model: torch.nn.Module,
    params: Params,
    *,
    overrides: AdamOverrides = _FROM_FILE,
    min_coverage: float = 0.9,
    allow_low_coverage: bool = False,
) -> tuple[AdamState, OptimizerReport]:
    """The AdamW state saved in `path`, attached to names; moments are the file's, bit for bit.

    `model` is the module that was trained: its named_parameters() give positions their names.
    `params` is the registry. Coverage is the share of the registry that has exp_avg and
    exp_avg_sq. A name whose step neither the file nor `checkpoint_step` gives is left out of
    `step`, with a note.

    Raises InputError, one line, for a file that is no plain torch checkpoint; for another
    optimizer, amsgrad, maximize, or weight decay that is not decoupled; for other names, groups
    or shapes than the registry's; for coverage under `min_coverage` unless `allow_low_coverage`.
    """
    least = 0.0 if allow_low_coverage else min_coverage
    try:
        groups, state = load_entries(path)
        names, format_, route = _names(groups, model, params)
        entries = _by_name(list(chain(*names)), state, params)
        notes: list[str] = []
        exp_avg = _moments("exp_avg", entries, params, notes)
        exp_avg_sq = _moments("exp_avg_sq", entries, params, notes)
        saved = {
            name: int(number(entry["step"], f"step of {name}", whole=True))
            for name, entry in entries.items()
            if entry.get("step") is not None
        }
        coverage = {"exp_avg_sq": len(exp_avg_sq), "exp_avg": len(exp_avg), "step": len(saved)}
        _require_coverage(coverage, params, exp_avg.keys() & exp_avg_sq.keys(), least)
        step = _with_given_step(saved, params, overrides.checkpoint_step, notes)
        used = _adam_groups(groups, names, params, format_, overrides, notes)
    except InputError as error:
        raise located(path, error) from error.__cause__
    if positional := route != _BY_NAME:
        notes.append("positions follow the installed modelling code: equal shapes look alike")
    report = OptimizerReport(path, format_, route, positional, len(params), coverage, tuple(notes))
    return AdamState(exp_avg, exp_avg_sq, step, used), report


def _names(groups: Groups, model: torch.nn.Module, params: Params) -> tuple[list[list[str]], str, str]:
    """(names of each group's positions, frozen ones included; the format; the route)."""
    sizes = [len(group["params"]) for group in groups]
    if any("param_names" in group for group in groups):
        named = [group.get("param_names") for group in groups]
        if [len(n) if isinstance(n, list) else None for n in named] != sizes:
            raise InputError(f"param_names and params of a group differ in length; {EXPECTED}")
        return [[_unwrapped(n) for n in names or ()] for names in named], _TORCH, _BY_NAME
    everything = [name for name, _ in model.named_parameters()]
    order = [name for name in everything if name in params]
    decay = _decay_names(model)
    replayed = [[n for n in order if n in decay], [n for n in order if n not in decay]]
    expected = [len(names) for names in replayed]
    if sizes == expected and number(groups[1].get("weight_decay"), "weight_decay") == 0:
        return replayed, _TRAINER, "by position, the Trainer's [decay, no-decay] grouping replayed"
    if sizes == [len(order)]:
        return [order], _TORCH, "by position, one group in named_parameters() order"
    if sizes == [len(everything)]:
        return [everything], _TORCH, "by position, one group of all in named_parameters() order"
    raise InputError(
        f"holds {sum(sizes)} tensors in groups of {_and(sizes)}, the adapter has {len(order)} "
        f"trainable ones ({_and(expected)} in the Trainer's groups): {_FOREIGN}; give its own, or "
        "build the optimizer from named_parameters(), so that names are saved"
    )


def _by_name(names: list[str], state: Entries, params: Params) -> dict[str, dict[str, Any]]:
    entries = dict(zip(names, state, strict=True))
    if len(entries) < len(names):
        raise InputError(f"a name stands twice in param_names; {EXPECTED}")
    if missing := params.keys() - entries.keys():
        raise InputError(
            f"{len(missing)} of the adapter's {len(params)} trainable parameters are not among the "
            f"optimizer's {len(names)}: {some(missing)}; {_FOREIGN}"
        )
    if extra := [name for name, entry in entries.items() if entry and name not in params]:
        raise InputError(f"state for what the adapter does not train: {some(extra)}; {_FOREIGN}")
    return {name: entries[name] for name in sorted(params)}


def _moments(key: str, entries: dict[str, dict[str, Any]], params: Params, notes: list[str]) -> Params:
    found = {name: entry[key] for name, entry in entries.items() if entry.get(key) is not None}
    suspect = 0
    for name, moment in found.items():
        plain = isinstance(moment, torch.Tensor) and moment.layout is torch.strided
        if not plain or moment.dtype not in _DTYPES or moment.device.type != "cpu":
            raise InputError(f"{key} of {name} is not a plain floating point tensor; {EXPECTED}")
        if moment.shape != params[name].shape:
            raise InputError(
                f"{key} of {name} has shape {tuple(moment.shape)}, the adapter's has "
                f"{tuple(params[name].shape)}: {_FOREIGN}"
            )
        negative = key == "exp_avg_sq" and bool((moment < 0).any())
        suspect += negative or not bool(moment.isfinite().all())
    if suspect:
        notes.append(f"{key} has negative or non-finite entries in {suspect} tensors")
    return {name: moment.detach() for name, moment in found.items()}


def _require_coverage(
    coverage: dict[str, int], params: Params, covered: set[str], least: float
) -> None:
    if len(covered) < least * len(params):
        table = ", ".join(f"{key} {count}" for key, count in coverage.items())
        raise InputError(
            f"{table} of {len(params)} parameters, expected {least:g} of them (min_coverage); "
            f"without: {some(params.keys() - covered)}; give a complete state, or set "
            'on_low_coverage = "identity"'
        )


def _with_given_step(
    step: dict[str, int], params: Params, given: int | None, notes: list[str]
) -> dict[str, int]:
    missing = len(params) - len(step)
    if missing and given is None:
        notes.append(f"no step for {missing} parameters, in the file or as checkpoint_step")
    if not missing or given is None:
        return step
    filled = int(number(given, "checkpoint_step", least=1, whole=True))
    notes.append(f"step of {missing} parameters is the config's checkpoint_step, {filled}")
    return {name: step.get(name, filled) for name in params}


def _adam_groups(
    groups: Groups,
    names: list[list[str]],
    params: Params,
    format_: str,
    overrides: AdamOverrides,
    notes: list[str],
) -> tuple[AdamGroup, ...]:
    """The groups that hold anything of the registry, with the config's numbers where it has any."""
    no_decay = groups[1] if format_ == _TRAINER else None
    kept = [tuple(name for name in group if name in params) for group in names]
    groups, kept = [g for g, n in zip(groups, kept, strict=True) if n], [n for n in kept if n]
    found = [_of_group(group) for group in groups]
    rates = [hyper["lr"] for hyper in found]
    if not rates[0]:  # the start of a warm-up or the end of a schedule, which scales initial_lr
        rates = [number(group.get("initial_lr", 0.0), "initial_lr") for group in groups]
    decaying = any(hyper["weight_decay"] for hyper in found)
    given = {k: v for k, v in overrides._asdict().items() if v is not None and k in found[0]}
    used = []
    for group, hyper, rate in zip(groups, found, rates, strict=True):
        new = dict(given)
        if "lr" in new:
            new["lr"] *= rate / rates[0] if rates[0] else 1.0
        if not hyper["weight_decay"] and (decaying or group is no_decay):
            new.pop("weight_decay", None)
        used.append(hyper | new)
        if used[-1]["weight_decay"] and group.get("decoupled_weight_decay") is False:
            raise InputError(
                "torch.optim.Adam with weight decay inside the gradient (decoupled_weight_decay = "
                "False), expected AdamW's: train with AdamW, or set weight_decay = 0 to leave it out"
            )
    notes.append(f"lr in the file is the next step's: {_and(hyper['lr'] for hyper in found)}")
    for key, value in given.items():
        if was := {f[key] for f, u in zip(found, used, strict=True) if f[key] != u[key]}:
            label, values = key.replace("_", " "), _and(sorted(was))
            notes.append(f"{label} {values} in the file, {value} in the config: the config's is used")
    return tuple(AdamGroup(n, **hyper) for n, hyper in zip(kept, used, strict=True))


def _of_group(group: dict[str, Any]) -> dict[str, float]:
    if missing := {"lr", "betas", "eps", "weight_decay"} - group.keys():
        raise InputError(f"a group without {some(missing)}; {EXPECTED}")
    if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
        raise InputError(f"betas are {group['betas']!r:.80}, expected two numbers")
    numbers = {key: number(group[key], key) for key in ("lr", "eps", "weight_decay")}
    return numbers | {
        f"beta{i}": number(b, f"beta{i}", below=1.0) for i, b in enumerate(group["betas"], 1)
    }


def _decay_names(model: torch.nn.Module) -> set[str]:
    from transformers import Trainer  # slow to import, and for one route only

    # The method reads nothing of its trainer, and a trainer cannot be built without a run.
    return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]


def _unwrapped(name: object) -> str:
    """Without the prefixes of DistributedDataParallel and torch.compile."""
    return str(name).removeprefix("module.").replace("_orig_mod.", "")


def _and(values: Iterable[object]) -> str:
    return " and ".join(map(str, values))
