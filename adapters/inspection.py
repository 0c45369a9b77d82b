"""`funcprobe inspect`: format, names and certainty, coverage, statistics of an optimizer state."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from funcprobe.step import adam
from funcprobe.types import AdamState, InputError, Params

from .checkpoint.trainer_state import FILE, trained_steps
from .optimizer import OptimizerReport, Saved, Sidecar, find_sidecar, open_state
from .optimizer.attach import attach
from .optimizer.bounded import is_plain
from .optimizer.hyper import AdamOverrides, require_lr_ratio
from .optimizer.names import Names, name_keys
from .optimizer.saved import located, number, require_adam, shaped

if TYPE_CHECKING:
    from .checkpoint.skeleton import Skeleton

BELOW_EPS = 0.5  # share of entries with sqrt(nu_hat) < eps beyond which a state is suspect


def inspect(path: Path, *, base: str | None = None, adapter: str = "default") -> dict[str, Any]:
    """Format, groups, names and their certainty, coverage, hyper-parameters, statistics, what lacks.

    `path` is a checkpoint's folder, or a state's file or folder. Positions are named by a skeleton of
    the adapter on its base's configuration (`base` instead of the one saved with the adapter); no
    weights are read. Raises InputError, one line, if the state cannot be read or is not AdamW's.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a checkpoint or an optimizer's state")
    try:
        saved = open_state(path)
        require_adam(saved)
    except InputError as error:
        raise error if str(error).startswith(str(path)) else located(path, error) from error
    sidecar = find_sidecar(saved.path)
    checkpoint = path if path.is_dir() else path.parent
    missing: list[str] = []
    skeleton = _skeleton(checkpoint, base, adapter, missing)
    unknown = _unknown(saved, missing)
    document = {
        "path": str(saved.path),
        "format": saved.format,
        "groups": [_group(group, saved) for group in saved.groups],
        "tensors_with_state": len(saved.state),
        "steps": _steps(saved),
        "trainer_state_step": _trainer_step(checkpoint, missing),
        "sidecar": _sidecar(sidecar, missing),
    }
    found = _named(saved, skeleton, sidecar, unknown)
    if found is None:
        missing.append("names: the state has positions only, and no adapter configuration was found")
        return document | {
            "names": None,
            "second_moments": None,
            "missing": missing,
            "notes": saved.notes,
        }
    adam_state, report, names = found
    if unknown.lr is None:
        try:
            require_lr_ratio(saved.groups, names, _shapes(adam_state), unknown)
        except InputError as error:
            missing.append(f"the next step's lr: {error}")
    info = adam.preconditioner(_shapes(adam_state), adam_state)[1]
    second = None
    if unknown.eps is None and unknown.beta2 is None:
        second = {key: _plain(value) for key, value in info._asdict().items()}
        second["verdict"] = _verdict(info, sum(t.numel() for t in adam_state.exp_avg_sq.values()))
    return document | {
        "format": report.format,
        "names": {
            "route": report.route,
            "certainty": report.certainty,
            "verified_by_gradients": bool(report.twins),
            "base": skeleton.base if skeleton else None,
            "parameters": report.parameters,
            "coverage": report.coverage,
            "groups": names.groups,
        },
        "second_moments": second,
        "missing": missing,
        "notes": report.notes,
    }


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document."""
    names, steps, second = document["names"], document["steps"], document["second_moments"]
    rows = {"state": document["path"], "format": document["format"]}
    if names:
        rows["names"] = names["route"]
        rows["certainty"] = names["certainty"]
        if names["verified_by_gradients"]:
            rows["certainty"] += "; a run verifies the order by the gradients on U"
        coverage = ", ".join(f"{key} {count}" for key, count in names["coverage"].items())
        rows["coverage"] = f"{coverage} of {names['parameters']} parameters"
    if steps:
        taken = f"{steps['least']}" + (f" to {steps['most']}" if steps["most"] > steps["least"] else "")
        trained = document["trainer_state_step"]
        differ = (
            ""
            if trained in (None, steps["most"])
            else f"; WARNING: trainer_state.json records {trained}"
        )
        rows["steps taken"] = taken + differ
    if second:
        rows["scale 1/(sqrt(nu)+eps)"] = (
            f"largest {_figure(second['max_scale'])}, smallest denominator "
            f"{_figure(second['min_denominator'])}; entries of nu: "
            f"{second['zero_second_moments']} zero, {second['tiny_second_moments']} below eps^2"
        )
        rows["verdict"] = second["verdict"]
    if sidecar := document["sidecar"]:
        rows["max_grad_norm"] = _figure(sidecar["max_grad_norm"])
        for key in ("loss", "sampling"):
            rows[f"the run's {key}"] = (
                ", ".join(f"{k} {v}" for k, v in sidecar[key].items()) or "unknown"
            )
    width = max(map(len, rows))
    for label, text in rows.items():
        plain = "".join(c if c.isprintable() else " " for c in text)
        console.print(f"{label:<{width}}  {plain}", soft_wrap=True, markup=False)
    table = Table(title="Groups", title_justify="left")
    for column in ("", "parameters", "with state", "next lr", "betas", "eps", "weight decay"):
        table.add_column(column, justify="right")
    for i, group in enumerate(document["groups"]):
        cells = [group.get(key, "unknown") for key in ("lr", "betas", "eps", "weight_decay")]
        shown = [i, group["parameters"], group["with_state"], *cells]
        table.add_row(*map(str, shown))
    console.print(table)
    for label, key in (("note", "notes"), ("missing", "missing")):
        for line in document[key]:
            console.print(f"{label}: {line}", soft_wrap=True, markup=False)


def _figure(value: float | str | None) -> str:
    return "unknown" if value is None else f"{float(value):.4g}"


def _unknown(saved: Saved, missing: list[str]) -> AdamOverrides:
    """Placeholders for hyper-parameters that a run's configuration must set, to show the rest."""
    groups = [group for group in saved.groups if group["params"]]
    lacking: dict[str, Any] = {
        key: 0.0 for key in ("lr", "eps", "weight_decay") if any(key not in g for g in groups)
    }
    if any("betas" not in group for group in groups):
        lacking |= {"beta1": 0.0, "beta2": 0.0}
        missing.append("betas of its groups: set optimizer.betas as in training")
    missing += [
        f"{key} of its groups: set optimizer.{key} as in training"
        for key in lacking
        if "beta" not in key
    ]
    return AdamOverrides()._replace(**lacking)


def _named(
    saved: Saved, skeleton: "Skeleton | None", sidecar: Sidecar | None, unknown: AdamOverrides
) -> tuple[AdamState, OptimizerReport, Names] | None:
    """The state by name: of the skeleton's registry, else of the saved names."""
    try:
        if skeleton is not None:
            names = name_keys(saved, skeleton.model, skeleton.params, sidecar)
            params = skeleton.params
        elif saved.by_name or sidecar or any("param_names" in group for group in saved.groups):
            names = name_keys(saved, torch.nn.Module(), {}, sidecar)
            flat = [name for group in names.groups for name in group]
            moments = [shaped(saved.state.get(key, {})) for key in saved.keys]
            params = {n: t for n, t in zip(flat, moments, strict=True) if t is not None}
        else:
            return None
        return *attach(saved, names, params, unknown, 0.0, sidecar), names
    except InputError as error:
        raise located(saved.path, error) from error


def _skeleton(
    checkpoint: Path, base: str | None, adapter: str, missing: list[str]
) -> "Skeleton | None":
    from .checkpoint.adapter import find_adapter, has_full_model  # imports transformers and peft
    from .checkpoint.skeleton import skeleton
    from .stages.step import require_own_state

    try:
        require_own_state(checkpoint, adapter)
        if not has_full_model(checkpoint):
            find_adapter(str(checkpoint), None if adapter == "default" else adapter)
        return skeleton(checkpoint, base, adapter)
    except InputError as error:
        if base is not None:
            raise
        missing.append(f"the adapter, to which coverage refers: {error}")
        return None


def _shapes(adam_state: AdamState) -> Params:
    names = [name for group in adam_state.groups for name in group.names]
    return {name: adam_state.exp_avg_sq.get(name, torch.zeros(0)) for name in names}


def _group(group: dict[str, Any], saved: Saved) -> dict[str, Any]:
    plain = {k: _plain(v) for k, v in group.items() if k not in {"params", "param_names"}}
    with_state = sum(key in saved.state for key in group["params"])
    return {"parameters": len(group["params"]), "with_state": with_state, **plain}


def _plain(value: Any) -> Any:
    """As a JSON value: numbers, lists, text; infinity and other types as their text."""
    if isinstance(value, torch.Tensor) and not is_plain(value):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, torch.Tensor | np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def _steps(saved: Saved) -> dict[str, int] | None:
    steps = [
        int(number(entry["step"], f"{saved.path}: step of {key}", whole=True))
        for key, entry in saved.state.items()
        if entry.get("step") is not None
    ]
    return {"least": min(steps), "most": max(steps), "known": len(steps)} if steps else None


def _trainer_step(checkpoint: Path, missing: list[str]) -> int | None:
    steps = trained_steps(checkpoint)
    if steps is None:
        missing.append(f"{FILE}, with whose step that of the state would be compared")
    return steps


def _sidecar(sidecar: Sidecar | None, missing: list[str]) -> dict[str, Any] | None:
    if sidecar is None:
        missing.append(
            "optimizer_param_names.json: names, max_grad_norm, loss and sampling settings of the run "
            "(ParamNamesCallback writes it)"
        )
        return None
    return {
        "path": str(sidecar.path),
        "max_grad_norm": sidecar.max_grad_norm,
        "loss": sidecar.loss,
        "sampling": sidecar.sampling,
        "versions": sidecar.versions,
    }


def _verdict(info: adam.PreconditionerInfo, entries: int) -> str:
    """Statistics outside the range of a normal training run; "healthy" if there are none."""
    findings = []
    if info.identity:
        findings.append(f"{len(info.identity)} tensors without a usable second moment")
    if info.without_step:
        findings.append(f"{len(info.without_step)} without a step, so without bias correction")
    below = info.zero_second_moments + info.tiny_second_moments
    if below > BELOW_EPS * entries:
        findings.append(
            f"suspect: sqrt(nu) is below eps in {below} of {entries} entries, whose step is g / eps"
        )
    return "; ".join(findings) or "healthy"
