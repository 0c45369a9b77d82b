"""Adam's state from a training run's file, matched to the registry by name."""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcprobe.types import AdamState, InputError, Params

from . import eight_bit
from .formats import open_state
from .hyper import AdamOverrides, adam_groups, live_groups, require_lr_ratio
from .names import FOREIGN, Names, another_order, live_names, name_keys, require_verifiable
from .saved import Entry, Saved, located, number, require_adam, some
from .sidecar import Sidecar, find_sidecar
from .torch_file import well_formed


class OptimizerReport(NamedTuple):
    """How the state was matched to the registry; for the reader of the results, not used in them."""

    path: Path
    format: str  # "Hugging Face Trainer", "torch.optim", "DeepSpeed universal", ...
    route: str  # how names were found
    positional: bool  # True: names follow from the order of positions, by replaying the trainer's
    twins: int  # registry parameters that only position distinguishes from another of equal shape
    parameters: int  # in the registry
    coverage: dict[str, int]  # number of them with exp_avg_sq, exp_avg, step in the file
    sidecar: Sidecar | None
    notes: tuple[str, ...]

    @property
    def certainty(self) -> str:
        """Certainty of the names: certain, verified by shapes, or not verifiable."""
        if not self.positional:
            return "certain"
        if not self.twins:
            return "verified, every shape is unique"
        shared = f"{self.twins} of {self.parameters} share their shape with another"
        return f"not verifiable from the file alone, {shared}"

    def document(self) -> dict[str, Any]:
        """The report as a JSON-compatible dictionary."""
        return self._asdict() | {
            "path": str(self.path),
            "certainty": self.certainty,
            "sidecar": str(self.sidecar.path) if self.sidecar else None,
        }


_FROM_FILE = AdamOverrides()
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def read_adam_state(
    path: Path,
    model: torch.nn.Module,
    params: Params,
    *,
    overrides: AdamOverrides = _FROM_FILE,
    min_coverage: float = 0.9,
    allow_low_coverage: bool = False,
    accept_positional: bool = False,
) -> tuple[AdamState, OptimizerReport]:
    """The AdamW state saved in `path`, a file or folder, by parameter name; moments are as saved.

    `model` is the module that was trained: its named_parameters() name the positions if neither the
    state nor a sidecar does. `params` is the registry. Coverage is the share of the registry that has
    exp_avg and exp_avg_sq. A parameter without a step, in the file or as `checkpoint_step`, is omitted
    from `step`, with a note.

    Raises InputError, one line, for a state that no importer can read; for another optimizer, amsgrad,
    maximize, or weight decay that is not decoupled; for other names, groups or shapes than the
    registry's; for coverage below `min_coverage` unless `allow_low_coverage`; and for parameters of
    equal shape that only position distinguishes, unless `accept_positional`.
    """
    least = 0.0 if allow_low_coverage else min_coverage
    try:
        saved = open_state(path)
        require_adam(saved)
    except InputError as error:
        raise _at(path, error) from error.__cause__
    sidecar = find_sidecar(saved.path)
    try:
        names = name_keys(saved, model, params, sidecar)
        state, report = attach(saved, names, params, overrides, least, sidecar)
        require_lr_ratio(saved.groups, names, params, overrides)
        require_verifiable(names, params, accept_positional)
    except InputError as error:
        raise _at(saved.path, error) from error.__cause__
    return state, report


def live_adam_state(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, params: Params
) -> tuple[AdamState, OptimizerReport]:
    """A copy of the state of an optimizer in use, named by the identity of its parameters.

    If all its learning rates are 0, as at the start of a warm-up, the groups have initial_lr as lr, for
    the ratio that the direction needs. Raises InputError, one line, as `read_adam_state` does, and for
    a parameter that is not in the model.
    """
    content = optimizer.state_dict()
    copied = {
        key: {k: v.detach().to("cpu", copy=True) if torch.is_tensor(v) else v for k, v in entry.items()}
        for key, entry in content["state"].items()
    }
    place = Path(type(optimizer).__name__)
    saved = well_formed(place, content | {"state": copied}, "live optimizer")
    saved = eight_bit.dequantised(saved)
    require_adam(saved)
    names = live_names(optimizer, model)
    state, report = attach(saved, names, params, _FROM_FILE, 1.0, None)
    return state._replace(groups=live_groups(state.groups, saved.groups, names, params)), report


def attach(
    saved: Saved,
    names: Names,
    params: Params,
    overrides: AdamOverrides,
    least: float,
    sidecar: Sidecar | None,
) -> tuple[AdamState, OptimizerReport]:
    """The state by registry name; InputError, without the path, if it does not match the registry."""
    notes = list(saved.notes)
    entries = _by_name(saved, names, params)
    exp_avg = _moments("exp_avg", entries, saved, names, params, notes)
    exp_avg_sq = _moments("exp_avg_sq", entries, saved, names, params, notes)
    steps = {
        name: int(number(entry["step"], f"step of {name}", whole=True))
        for name, entry in entries.items()
        if entry.get("step") is not None
    }
    coverage = {"exp_avg_sq": len(exp_avg_sq), "exp_avg": len(exp_avg), "step": len(steps)}
    _require_coverage(coverage, params, exp_avg.keys() & exp_avg_sq.keys(), least)
    step = _with_given_step(steps, params, overrides.checkpoint_step, notes)
    used = adam_groups(saved.groups, names, params, overrides, notes)
    report = OptimizerReport(
        path=saved.path,
        format=names.format,
        route=names.route,
        positional=names.positional,
        twins=len(names.twins),
        parameters=len(params),
        coverage=coverage,
        sidecar=sidecar,
        notes=tuple(notes),
    )
    return AdamState(exp_avg, exp_avg_sq, step, used), report


def _at(path: Path, error: InputError) -> InputError:
    """The error with the path in front, unless the importer has given a more specific one."""
    return error if str(error).startswith(str(path)) else located(path, error)


def _by_name(saved: Saved, names: Names, params: Params) -> dict[str, Entry]:
    flat = list(chain(*names.groups))
    entries = {name: saved.state.get(key, {}) for key, name in zip(saved.keys, flat, strict=True)}
    if len(entries) < len(flat):
        twice = [name for name, times in Counter(flat).items() if times > 1]
        raise InputError(f"{some(twice)} occurs twice among its names: the file is damaged")
    if missing := params.keys() - entries.keys():
        raise InputError(
            f"{len(missing)} of the adapter's {len(params)} trainable parameters are not among the "
            f"optimizer's {len(flat)}: {some(missing)}; {FOREIGN}"
        )
    if extra := [name for name, entry in entries.items() if entry and name not in params]:
        raise InputError(f"state for parameters that are not trainable: {some(extra)}; {FOREIGN}")
    return {name: entries[name] for name in sorted(params)}


def _moments(
    key: str,
    entries: dict[str, Entry],
    saved: Saved,
    names: Names,
    params: Params,
    notes: list[str],
) -> Params:
    found = {name: entry[key] for name, entry in entries.items() if entry.get(key) is not None}
    suspect = 0
    for name, moment in found.items():
        plain = isinstance(moment, torch.Tensor) and moment.layout is torch.strided
        if not plain or moment.dtype not in _DTYPES or moment.device.type != "cpu":
            raise InputError(
                f"{key} of {name} is not a plain floating-point tensor: the file is damaged, or of "
                "another optimizer"
            )
        if moment.shape != params[name].shape:
            why = FOREIGN
            if names.positional and another_order(saved, names, params):
                why = (
                    "the state has the adapter's shapes in another order, so that its optimizer was "
                    "not built in the order of named_parameters(); save names with ParamNamesCallback"
                )
            raise InputError(
                f"{key} of {name} has shape {tuple(moment.shape)}, the adapter's has "
                f"{tuple(params[name].shape)}: {why}"
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
            f"coverage: {table} of {len(params)} parameters, expected a share of {least:g} "
            f"(min_coverage); missing: {some(params.keys() - covered)}; give a complete state, or set "
            'on_low_coverage = "identity"'
        )


def _with_given_step(
    step: dict[str, int], params: Params, given: int | None, notes: list[str]
) -> dict[str, int]:
    missing = len(params) - len(step)
    if missing and given is None:
        notes.append(f"no step for {missing} parameters, neither in the file nor as checkpoint_step")
    if not missing or given is None:
        return step
    filled = int(number(given, "checkpoint_step", least=1, whole=True))
    notes.append(f"step of {missing} parameters: checkpoint_step of the config, {filled}")
    return {name: step.get(name, filled) for name in params}
