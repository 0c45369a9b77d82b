"""What is logged of a run, for every program the same; every number is one of results.json."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..config.estimation import observable_label
from ..config.schema import Config
from ..results.quantity import Interval
from ..results.saved import SavedRun
from ..results.schema import Results
from ..results.verdict import verdict_line, verdict_of

PREFIX = "funcprobe"  # of every key, as of ProbeCallback's
COLUMNS = (
    *("eta", "predicted", "predicted_low", "predicted_high", "second_order"),
    *("measured", "measured_low", "measured_high", "ratio", "ess", "verdict"),
)


class Picture(NamedTuple):
    """A figure of the report as a file."""

    name: str
    file: Path
    caption: str


class Logged(NamedTuple):
    """A run, ready to be logged."""

    name: str
    project: str
    group: str | None
    step: int | None  # steps that the checkpoint was trained for; None: not known
    scalars: dict[str, float]
    headline: str
    columns: tuple[str, ...]
    rows: list[list[float | str | None]]  # of the sweep, a learning rate each
    pictures: list[Picture]
    files: list[Path]  # what belongs to the report, report.html first
    config: dict[str, Any]


def scalars(results: Results) -> dict[str, float]:
    """funcprobe/KEY -> number; what a run does not have is left out."""
    return {f"{PREFIX}/{key}": value for key, value in _scalars(results) if value is not None}


def _scalars(results: Results) -> Iterator[tuple[str, float | None]]:
    first, verdict = results.first_order, verdict_of(results)
    yield from _with_bounds("entropy", results.entropy.value, results.entropy_interval)
    yield from _with_bounds("derivative", first.derivative.value, first.interval_total)
    yield "derivative_from_update", first.from_update.value
    yield "derivative_from_momentum", first.from_momentum.value
    yield "derivative_from_weight_decay", first.from_weight_decay.value
    yield "lr", results.next_lr.value
    for row in (row for row in results.sweep if row.is_next_lr):
        yield from _with_bounds("predicted", row.predicted.value, row.interval_total)
        yield from _with_bounds("measured", row.measured.value, row.measured_interval_given_U)
        yield from (("ratio", row.ratio.value), ("ess", row.ess.value))
    yield "predicted_relative", verdict.relative
    yield from (("predicted_relative_low", verdict.low), ("predicted_relative_high", verdict.high))
    yield "reward", results.mean_reward.value if results.mean_reward else None
    for one in results.observables:
        name = f"observable/{observable_label(one.name)}"
        yield from _with_bounds(name, one.at_theta.value, one.interval)
        for at in (at for at in one.sweep if at.is_next_lr):
            yield from _with_bounds(f"{name}/predicted", at.predicted.value, at.interval_given_U)
            measured = at.measured_interval_given_U
            yield from _with_bounds(f"{name}/measured", at.measured.value, measured)
    yield from (
        ("checks", len(results.checks)),
        ("checks_passed", sum(c.passed for c in results.checks)),
    )


def _with_bounds(
    name: str, value: float, interval: Interval | None
) -> Iterator[tuple[str, float | None]]:
    yield name, value
    yield f"{name}_low", interval.low if interval else None
    yield f"{name}_high", interval.high if interval else None


def table(results: Results) -> list[list[float | str | None]]:
    """The sweep in COLUMNS; None for what results.json holds as null."""
    frame = results.to_dataframe()[list(COLUMNS)]
    rows = frame.astype(object).where(frame.notna(), None)
    return [list(row) for row in rows.itertuples(index=False)]


def pictures(folder: Path) -> list[Picture]:
    """The figures of the run folder; NAME.txt is a title, an empty line and a caption."""
    found = []
    for file in sorted((folder / "figures").glob("*.png")):
        words = file.with_suffix(".txt")
        text = words.read_text(encoding="utf-8") if words.is_file() else file.stem
        found.append(Picture(file.stem, file, " ".join(text.split())))
    return found


def logged(run: SavedRun, config: Config, step: int | None) -> Logged:
    """Everything of a run folder that is logged."""
    own = [run.folder / name for name in ("report.html", "results.json", "config.toml")]
    return Logged(
        name=run.folder.name,
        project=config.log.project,
        group=config.log.group,
        step=step,
        scalars=scalars(run.results),
        headline=verdict_line(run.results),
        columns=COLUMNS,
        rows=table(run.results),
        pictures=pictures(run.folder),
        files=[path for path in own if path.is_file()],
        config=config.model_dump(mode="json", exclude_none=True),
    )
