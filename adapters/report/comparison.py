"""compare.html: runs side by side as one page."""

from functools import partial
from pathlib import Path

from markupsafe import Markup

from ..results.comparison_sections import ComparedRun, Comparison, EntropyPath
from ..results.quantity import Interval
from ..store import write_whole
from . import numbers
from .comparison_charts import comparison_figures
from .document import ENVIRONMENT, asset, document
from .page import drawn
from .table import Column, Row, Table, table
from .theme import css_variables

NO = Markup('<span class="none">–</span>')


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page; it appears only when complete."""
    write_whole(path, partial(_write, comparison_html(comparison)))


def _write(html: str, target: Path) -> None:
    target.write_text(html, encoding="utf-8")


def comparison_html(comparison: Comparison) -> str:
    """The page, self-contained, without a script."""
    made = {figure.name: drawn(figure) for figure in comparison_figures(comparison)}
    path = comparison.path
    body = ENVIRONMENT.get_template("compare.html.j2").render(
        comparison=comparison,
        figures=made,
        runs=_runs(comparison),
        between=None if path is None else _between(path, comparison.unit),
        reached=None if path is None else _reached(comparison, path),
        differing=_differing(comparison) if comparison.differing else None,
        seen=_seen(comparison),
        layers=_groups(comparison),
        folders=table(
            "Folders of the runs",
            "The runs, in this order.",
            ["run", "folder", "checkpoint"],
            [(run.label, run.folder, run.checkpoint) for run in comparison.runs],
        ),
    )
    styles = css_variables() + asset("page.css")
    return document(f"{len(comparison.runs)} runs – funcprobe", Markup(body), styles=styles)


def _runs(comparison: Comparison) -> Table:
    runs = comparison.runs
    unit = runs[0].predicted.unit
    rows = [
        Row(
            [
                run.label,
                numbers.level(run.entropy.value, run.entropy_interval),
                numbers.setting(run.next_lr),
                numbers.change(run.predicted.value, run.predicted_interval),
                NO if run.relative is None else numbers.percent(run.relative, signed=True),
                NO
                if run.measured is None
                else numbers.change(run.measured.value, run.measured_interval),
                numbers.number(run.momentum, signed=True),
                numbers.number(run.update, signed=True),
                numbers.number(run.decay, signed=True),
                numbers.number(run.mean_reward),
            ]
        )
        for run in runs
    ]
    columns = [
        Column("run", text=True),
        Column("entropy", comparison.unit),
        Column("learning rate", "of the next step"),
        Column("predicted", unit),
        Column("relative", "to the entropy"),
        Column("measured", unit),
        Column("momentum", unit),
        Column("this batch", unit),
        Column("weight decay", unit),
        Column("reward", "mean of U"),
    ]
    caption = (
        "Entropy at theta and its change by the next step. ±: 95 % intervals, of the entropy and the "
        "measured change over the draws of E, of the predicted change over E and the prompts of U. "
        "Momentum, this batch and weight decay sum to the predicted change."
    )
    return Table(caption, columns, rows, "The next step of every run")


def _between(path: EntropyPath, unit: str) -> Table:
    rows = [
        Row(
            [
                f"{one.first} to {one.last}",
                numbers.setting(one.learning_rates),
                numbers.change(one.predicted, one.predicted_interval),
                numbers.change(one.actual, one.actual_interval),
                numbers.change(one.difference, one.difference_interval),
                "yes" if one.agrees else "no",
                "paired" if one.paired else "independent",
            ]
        )
        for one in path.between
    ]
    columns = [
        Column("steps", text=True),
        Column("learning rates", "sum"),
        Column("predicted", unit),
        Column("actual", unit),
        Column("actual − predicted", unit),
        Column("agrees", "the interval holds 0", text=True),
        Column("draws of E", text=True),
    ]
    caption = (
        "Change of the entropy from each checkpoint to the next. ±: 95 % intervals, of the predicted "
        "change over E and batches, of the actual one over the draws of E, of the difference over all."
    )
    return Table(caption, columns, rows, "Predicted and actual changes between checkpoints")


def _reached(comparison: Comparison, path: EntropyPath) -> Table:
    rows = [
        (
            str(one.step),
            numbers.level(one.entropy, one.interval),
            numbers.number(one.independent_half_width),
            numbers.level(run.entropy.value, run.entropy_interval),
        )
        for one, run in zip(path.reached, comparison.runs, strict=True)
    ]
    columns = [
        Column("step", text=True),
        Column("predictions added up", "± at least 95 %"),
        Column("± if independent"),
        Column("measured", "± 95 % over E"),
    ]
    caption = f"The entropy in {comparison.unit}, from the measured one at the first checkpoint."
    return table("Predictions added up", caption, columns, rows)


def _differing(comparison: Comparison) -> Table:
    columns = [Column("key", text=True), *(Column(run.label, text=True) for run in comparison.runs)]
    rows = [(one.key, *one.values) for one in comparison.differing]
    return table("Settings that differ", "Keys of the configuration that differ.", columns, rows)


def _seen(comparison: Comparison) -> Table | None:
    names = list(dict.fromkeys(one.name for run in comparison.runs for one in run.observables))
    if not names:
        return None
    units = {one.name: one.value.unit for run in comparison.runs for one in run.observables}
    columns = [Column("run", text=True), *(Column(name, units[name]) for name in names)]
    rows = [(run.label, *(_value(run, name) for name in names)) for run in comparison.runs]
    caption = "Observables on E at theta. ±: 95 % intervals over the draws of E."
    return table("Observables", caption, columns, rows)


def _value(run: ComparedRun, name: str) -> Markup:
    found = next((one for one in run.observables if one.name == name), None)
    if found is None:
        return NO
    interval: Interval = found.interval
    return numbers.level(found.value.value, interval)


def _groups(comparison: Comparison) -> Table | None:
    groups = [*comparison.projections, *comparison.layers]
    if not groups:
        return None
    columns = [Column("modules", text=True), *(Column(run.label) for run in comparison.runs)]
    rows = [(one.name, *(numbers.number(x, signed=True) for x in one.change)) for one in groups]
    unit = comparison.runs[0].predicted.unit
    caption = f"Predicted change by the next step by projection and by layer, {unit}."
    return table("Shares of modules", caption, columns, rows)
