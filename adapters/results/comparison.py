"""Runs side by side: in which order, what differs, where that is no comparison."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from funcprobe.types import InputError

from .attribution_sections import GroupShare
from .comparison_path import Point, entropy_path
from .comparison_sections import (
    SCHEMA_VERSION,
    ComparedRun,
    Comparison,
    Differing,
    EntropyPath,
    GroupOverRuns,
    Seen,
)
from .comparison_warnings import learning_rate_warnings
from .comparison_words import findings
from .quantity import Interval, quantity
from .saved import SavedRun

if TYPE_CHECKING:
    from ..checkpoint.training_log import TrainingLog

NOT_SET = "not set"
CHECKPOINT = "policy.checkpoint"
# What changes no number but by rounding, or has a place of its own.
_ASIDE = {"run.name", "run.folder", "run.report", "run.max_tokens", CHECKPOINT}
MOST = 12  # groups of modules


class Given(NamedTuple):
    """A run, and what its checkpoint says."""

    run: SavedRun
    step: int | None
    batch: int | None  # prompts of a step of its training


class _Ordered(NamedTuple):
    kind: str
    order: str
    given: list[Given]
    labels: list[str]
    differing: tuple[Differing, ...]


def compare(given: Sequence[Given], log: "TrainingLog | None") -> Comparison:
    """The runs in order. InputError for fewer than two, and for entropies of other conventions."""
    _require_two(given)
    unit = _require_one_unit(given)
    kind, order, given, labels, differing = _ordered(given)
    per_step = all(one.run.results.next_lr.value > 0 for one in given)
    runs = tuple(
        _compared(one, label, per_step=per_step) for one, label in zip(given, labels, strict=True)
    )
    path = None
    if kind == "checkpoints":
        path = entropy_path([Point(one.step or 0, one.run, one.batch) for one in given], log)
    warnings = _warnings(given, kind, path)
    return Comparison(
        schema_version=SCHEMA_VERSION,
        kind="checkpoints" if kind == "checkpoints" else "settings",
        order=order,
        findings=findings(runs, path, order, unit),
        warnings=tuple(warnings),
        unit=unit,
        runs=runs,
        differing=differing,
        projections=_groups(given, "projections", per_step=per_step),
        layers=_groups(given, "layers", per_step=per_step),
        path=path,
    )


def _require_two(given: Sequence[Given]) -> None:
    places = [one.run.folder.resolve() for one in given]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise InputError(f"{twice} is given twice: give every run once")
    if len(given) < 2:
        raise InputError("one run is nothing to compare: give two run folders or more")


def _require_one_unit(given: Sequence[Given]) -> str:
    """InputError where the entropies of two runs are of other definitions."""
    first = given[0].run
    for other in (one.run for one in given[1:]):
        for name in ("per", "integrand"):
            a, b = (getattr(run.results.conventions.entropy, name) for run in (first, other))
            if a != b:
                raise InputError(
                    f"{first.folder} has entropy.{name} = {a}, {other.folder} has {b}: these are other "
                    "quantities; run one of them again with the other's"
                )
        units = [run.results.entropy.unit for run in (first, other)]
        if units[0] != units[1]:
            raise InputError(
                f"{first.folder} is in {units[0]}, {other.folder} in {units[1]}: one unit is expected"
            )
    return first.results.entropy.unit


def _ordered(given: Sequence[Given]) -> _Ordered:
    configs = [_flat(one.run) for one in given]
    keys = sorted({key for config in configs for key in config if not key.startswith("log.")})
    differ = [
        key
        for key in keys
        if key not in _ASIDE and len({config.get(key, NOT_SET) for config in configs}) > 1
    ]
    steps = [one.step for one in given]
    folders = {str(Path(config.get(CHECKPOINT, "")).parent) for config in configs}
    if not differ and None not in steps and len(set(steps)) == len(steps) and len(folders) == 1:
        order = sorted(range(len(given)), key=lambda i: steps[i] or 0)
        labels = [f"step {steps[i]}" for i in order]
        return _Ordered("checkpoints", "training step", [given[i] for i in order], labels, ())
    if len({config.get(CHECKPOINT, "") for config in configs}) > 1:
        differ = [*differ, CHECKPOINT]

    def place(i: int) -> tuple[Any, ...]:
        values = [_sortable(configs[i].get(key, NOT_SET)) for key in differ]
        return (*values, steps[i] or 0, given[i].run.folder.name)

    order = sorted(range(len(given)), key=place)
    differing = tuple(
        Differing(key=key, values=tuple(configs[i].get(key, NOT_SET) for i in order)) for key in differ
    )
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    named = ", ".join(differ[:3]) + more or "name: no setting differs"
    labels = _labels(_folder_names([given[i].run.folder for i in order]), differing)
    return _Ordered("settings", named, [given[i] for i in order], labels, differing)


def _folder_names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, with as many parents as make each unlike the others."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _labels(names: Sequence[str], differing: Sequence[Differing]) -> list[str]:
    """What differs, where that is one key; the names of the folders where it is more."""
    if len(differing) != 1:
        return list(names)
    key, values = differing[0].key, differing[0].values
    if key == CHECKPOINT or len(set(values)) < len(values):
        return list(names)
    return [f"{key} = {value}" for value in values]


def _flat(run: SavedRun) -> dict[str, str]:
    """section.key -> value as text; {} where config.toml is gone or damaged."""
    found: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else key, inner)
        else:
            found[prefix] = value if isinstance(value, str) else json.dumps(value, default=str)

    add("", run.settings())
    return found


def _sortable(value: str) -> tuple[int, float, str]:
    try:
        return (0, float(value), value)
    except ValueError:
        return (1, 0.0, value)


def _compared(given: Given, label: str, *, per_step: bool) -> ComparedRun:
    """Changes by the next step; per unit of learning rate, for all alike, where a run has none."""
    run, results = given.run, given.run.results
    first, eta = results.first_order, results.next_lr.value
    scale = eta if per_step else 1.0
    over, unit = first.interval_total, results.entropy.unit if per_step else first.derivative.unit
    predicted = scale * first.derivative.value
    low, high = scale * over.low, scale * over.high
    before = results.entropy.value
    has_relative = per_step and before > 0
    row = next((row for row in results.sweep if row.is_next_lr and per_step), None)
    return ComparedRun(
        label=label,
        name=run.folder.name,
        folder=str(run.folder),
        checkpoint=_flat(run).get(CHECKPOINT, NOT_SET),
        step=given.step,
        entropy=results.entropy,
        entropy_interval=results.entropy_interval,
        next_lr=eta,
        predicted=quantity(
            predicted, unit, f"{'by the next step' if per_step else 'along v'}, to first order"
        ),
        predicted_interval=Interval(low=low, high=high),
        relative=predicted / before if has_relative else None,
        relative_interval=Interval(low=low / before, high=high / before) if has_relative else None,
        measured=row.measured if row else None,
        measured_interval=row.measured_interval_given_U if row else None,
        momentum=scale * first.from_momentum.value,
        decay=scale * first.from_weight_decay.value,
        update=scale * first.from_update.value,
        mean_reward=results.mean_reward.value if results.mean_reward else None,
        observables=tuple(
            Seen(name=one.name, value=one.at_theta, interval=one.interval)
            for one in results.observables
        ),
        checks_failed=sum(not one.passed and not one.advisory for one in results.checks),
    )


def _groups(given: Sequence[Given], name: str, *, per_step: bool) -> tuple[GroupOverRuns, ...]:
    """In the order of the first run; the largest where there are many."""
    sections = [one.run.results.attribution for one in given]
    if any(section is None for section in sections):
        return ()
    of_run: list[dict[str, float]] = []
    for section, one in zip(sections, given, strict=True):
        groups: Iterable[GroupShare] = getattr(section, name)
        scale = one.run.results.next_lr.value if per_step else 1.0
        of_run.append({group.name: scale * group.total.share for group in groups})
    names = list(dict.fromkeys(key for shares in of_run for key in shares))
    found = [
        GroupOverRuns(name=key, change=tuple(shares.get(key) for shares in of_run)) for key in names
    ]
    largest = sorted(found, key=lambda one: -max(abs(x or 0.0) for x in one.change))[:MOST]
    return tuple(one for one in found if one in largest)


def _warnings(given: Sequence[Given], kind: str, path: EntropyPath | None) -> list[str]:
    """Where numbers of two runs are not of one kind."""
    runs = [one.run for one in given]
    said = [
        f"{run.folder.name} has no config.toml that can be read: what differs in it is not known"
        for run in runs
        if not _flat(run)
    ]

    def differ(values: Iterable[Any]) -> bool:
        return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1

    if differ(run.manifest.inputs.prompts for run in runs):
        said.append(
            "the runs have different prompts: differences between them are also those between prompts"
        )
    if differ(run.manifest.inputs.rollouts for run in runs):
        said.append("E or U is supplied from other files: the runs share no draws")
    sizes = [run.results.counts.E_sequences for run in runs]
    if differ(sizes):
        said.append(f"E is of other sizes, {min(sizes)} to {max(sizes)} responses")
    for name, what in (
        ("temperature", "the entropy is that of another distribution"),
        ("dtype", "rounding differs"),
        ("precision", "rounding differs"),
    ):
        values = [getattr(run.results.conventions, name) for run in runs]
        if differ(values):
            shown = ", ".join(sorted(map(str, set(values))))
            said.append(f"{name} differs ({shown}): {what}")
    if differ(run.manifest.inputs.policy.get("base") for run in runs):
        said.append(
            "the base models differ: where their tokenizers do, nats per token are of other tokens"
        )
    if differ(run.manifest.seed for run in runs):
        said.append("run.seed differs: the runs share no draws of prompts")
    code = [run.manifest.inputs.policy.get("code") for run in runs]
    if differ(code) or differ(run.manifest.versions for run in runs):
        said.append("the runs were made by other versions of funcprobe, or of its libraries")
    if path is not None and not all(one.paired for one in path.between):
        said.append(
            "not every pair of checkpoints shares its draws of E (another E, or no sequences.parquet "
            "with entropies): those intervals are of independent samples"
        )
    if kind != "checkpoints" and not said:
        said.append(
            "intervals are those of each run; no interval of a difference between runs is computed"
        )
    said += learning_rate_warnings(runs, kind, path)
    failed = [run.folder.name for run in runs if _failed(run)]
    if failed:
        said.append(f"sanity checks failed in {', '.join(failed)}: see their reports")
    return said


def _failed(run: SavedRun) -> bool:
    return any(not one.passed and not one.advisory for one in run.results.checks)
