"""The section of trust: checks, the optimizer's state, sampling, cost, versions, configuration."""

from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup

from ..results.cost import GIB, Entries
from ..results.manifest import OptimizerState
from ..results.saved import SavedRun
from ..results.schema import Results
from ..results.sections import CheckResult, StateEvidence
from . import numbers
from .sampling import batches, loss, sampling
from .table import Cell, Column, Fact, Row, Table, table
from .typeset import typeset


class Trust(NamedTuple):
    """What the template of the section shows."""

    passed: str
    """How many checks passed, in words."""
    failures: list[CheckResult]
    checks: Table
    optimizer: list[Fact]
    notes: list[str]
    """What was assumed or found while the optimizer's state was read."""
    sampling: Table
    missing: str
    """Why the table lacks numbers; empty: it lacks none."""
    batches: list[Fact]
    loss: Table | None
    cost: Table
    made_with: list[Fact]
    versions: Table


def trust(run: SavedRun) -> Trust:
    """Why the numbers can be relied on, or not."""
    results, manifest = run.results, run.manifest
    failures = [one for one in results.checks if not one.passed]
    return Trust(
        passed(results),
        failures,
        _checks(results),
        _optimizer(results, manifest.optimizer),
        list(manifest.optimizer.notes) if manifest.optimizer else [],
        *sampling(run),
        batches(results),
        loss(results),
        _cost(results),
        [
            ("Made", manifest.created),
            ("Python", manifest.python),
            ("Platform", manifest.platform),
            ("Device", manifest.device),
            ("Threads of torch", numbers.count(manifest.torch_threads)),
            ("Seed", str(manifest.seed)),
            ("Commit of funcprobe", manifest.git or "installed without its repository"),
        ],
        table(
            "Table: versions of packages",
            "Packages that the numbers depend on. The SHA-256 of every input is in manifest.json.",
            ["Package", "Version"],
            sorted(manifest.versions.items()),
        ),
    )


def passed(results: Results) -> str:
    """As "11 of 12 sanity checks passed"."""
    count = sum(one.passed for one in results.checks)
    return f"{count} of {len(results.checks)} sanity checks passed"


def _checks(results: Results) -> Table:
    ordered = sorted(results.checks, key=lambda one: (one.passed, one.advisory))
    rows = [
        Row(
            [
                one.name,
                "passed" if one.passed else "suspect" if one.advisory else "FAILED",
                typeset(one.saw),
                typeset(one.bound),
            ],
            not one.passed,
        )
        for one in ordered
    ]
    return Table(
        "The sanity checks of this run, failures first. Suspect: a hint, not a failure.",
        [
            Column("Check", text=True, wide=True),
            Column("Outcome", text=True),
            Column("Found", text=True, wide=True),
            Column("Required", text=True, wide=True),
        ],
        rows,
        "Table: sanity checks",
    )


def _optimizer(results: Results, state: OptimizerState | None) -> list[Fact]:
    if state is None:
        return [
            (
                "State",
                f'none is read: the rule is "{results.conventions.step.rule}". With optimizer.rule = '
                '"adamw" the step has the momentum and second moments of the checkpoint.',
            )
        ]
    found: list[Fact] = [
        ("State", f"{state.path}, {state.format}"),
        ("Names", f"{state.route}; {state.certainty}"),
        (
            "Coverage",
            ", ".join(f"{key} {count} of {state.parameters}" for key, count in state.coverage.items()),
        ),
    ]
    if state.positional:
        found.append(
            (
                "By position",
                "names rest on the order in which the trainer grouped the parameters; "
                f"{state.twins} have the shape of another",
            )
        )
    found += _evidence(results.state_evidence)
    moments = results.second_moments
    if moments is not None and moments.gradient_ratio is not None:
        found.append(
            (
                "Gradient against second moments",
                Markup(
                    "|Y| / √ν̂ has median {} over the tensors, about 1 where U is as large as a batch "
                    "of the training run; {} of the entries are beyond 10"
                ).format(
                    numbers.number(moments.gradient_ratio), numbers.percent(moments.gradient_beyond_ten)
                ),
            )
        )
    return found


def _evidence(found: StateEvidence | None) -> Iterable[Fact]:
    if found is None:
        return
    nearest = ""
    if found.log_odds_over_nearest is not None:
        nearest = Markup(", {} nats over the likeliest other, {}").format(
            numbers.number(found.log_odds_over_nearest), found.nearest_order or "unnamed"
        )
    yield (
        "Checked against the gradient",
        Markup(
            "{}: {} of {} tensors that share their shape fit their own second moments best; log odds "
            "{} nats over a random order{}"
        ).format(
            found.verdict,
            numbers.count(found.at_home),
            numbers.count(found.parameters),
            numbers.number(found.log_odds_over_random),
            nearest,
        ),
    )


def _cost(results: Results) -> Table:
    total = results.cost.total
    columns = [
        Column("Stage", text=True),
        Column("Time", "s"),
        Column("Passes over E"),
        Column("Passes over U"),
        Column("Tokens"),
        Column("Peak memory", "GiB, process"),
        *([Column("Peak memory", "GiB, GPU")] if total.device_peak_bytes is not None else []),
        Column("Reused", "results"),
    ]
    gpu = total.device_peak_bytes is not None
    rows = [Row(_stage(one.stage, one, gpu)) for one in results.cost.stages]
    rows.append(Row(_stage("all", total, gpu), True))
    return Table(
        "What the run took. A pass over a batch is every one of its sequences through the model once. "
        f"Peak memory is of {total.process_peak_of}.",
        columns,
        rows,
        "Table: cost by stage",
    )


def _stage(name: str, one: Entries, gpu: bool) -> list[Cell]:
    computed = one.results_reused + one.results_computed
    device = one.device_peak_bytes
    return [
        name,
        numbers.setting(one.seconds),
        *(numbers.setting(one.passes.get(batch)) for batch in "EU"),
        numbers.count(one.tokens),
        numbers.number(one.process_peak_bytes / GIB),
        *([None if device is None else numbers.number(device / GIB)] if gpu else []),
        f"{one.results_reused} of {computed}" if computed else None,
    ]
