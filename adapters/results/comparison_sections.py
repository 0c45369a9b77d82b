"""comparison.json as one typed object: runs side by side, and the path of the entropy over training."""

import html
from typing import TYPE_CHECKING, Literal

from .quantity import Interval, Quantity, Section, StudentInterval

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1


class Seen(Section):
    """An observable of a run at theta, on its E."""

    name: str
    """As in measure.observables."""
    value: Quantity
    """At theta."""
    interval: StudentInterval
    """Of the value, over the draws of E."""


class ComparedRun(Section):
    """What is compared of one run; changes are those by its next step, eta times the derivative."""

    label: str
    """Step, or what differs from the other runs."""
    name: str
    """Of its folder."""
    folder: str
    """Its path, as given."""
    checkpoint: str
    """policy.checkpoint."""
    step: int | None
    """Optimizer steps taken there; null: not known."""
    entropy: Quantity
    """H(theta) on E."""
    entropy_interval: StudentInterval
    """Of the entropy, over the draws of E."""
    next_lr: float
    """eta, the learning rate of the next step; 0 in any of the runs (a schedule's end, or not known):
    the changes of all of them are per unit of learning rate."""
    predicted: Quantity
    """Change of the entropy by the next step."""
    predicted_interval: Interval
    """Of that change, over E and the prompts of U, for an average U."""
    relative: float | None
    """Of the entropy; null: a run has no next_lr, or the entropy is 0."""
    relative_interval: Interval | None
    """The interval of the change over the entropy, whose own error is left out."""
    measured: Quantity | None
    """The change measured at next_lr; null: it was not measured there, or a run has no next_lr."""
    measured_interval: StudentInterval | None
    """Over E given U; null: not measured, or the weights' verdict is "resample"."""
    momentum: float
    """Part of `predicted`, in its unit: Adam's first moment."""
    decay: float
    """Part of `predicted`: weight decay."""
    update: float
    """Part of `predicted`: this batch's gradient."""
    mean_reward: float | None
    """Of U; null: no response has a reward."""
    observables: tuple[Seen, ...]
    """Beside the entropy."""
    checks_failed: int
    """Sanity checks that failed, hints excepted."""


class Differing(Section):
    """A key of the configuration in which runs differ."""

    key: str
    """As in the configuration."""
    values: tuple[str, ...]
    """As text, a value for each run."""


class GroupOverRuns(Section):
    """The share of one kind of module in every run."""

    name: str
    """Projection, or layer."""
    change: tuple[float | None, ...]
    """Its part of `predicted` in each run; null: the run has no such part."""


class Between(Section):
    """From one checkpoint to the next one compared: predicted at the first, and what happened."""

    first: int
    """Steps taken at the first checkpoint."""
    last: int
    """At the second."""
    learning_rates: float
    """Sum of the learning rates of the steps between."""
    predicted: float
    """That sum times the derivative at the first checkpoint."""
    predicted_interval: Interval
    """Over E, and over batches: U's own and those of the steps that were taken."""
    actual: float
    """Measured entropy at the second checkpoint less that at the first."""
    actual_interval: Interval
    """Over the draws of E."""
    paired: bool
    """Whether the interval is of differences on the same draws of prompts; else E's are independent."""
    difference: float
    """actual - predicted."""
    difference_interval: Interval
    """95 %, over all of these."""
    agrees: bool
    """Whether that interval holds 0."""


class Reached(Section):
    """The entropy that the predictions add up to, from the measured one at the first checkpoint."""

    step: int
    """Steps taken."""
    entropy: float
    """Predicted."""
    interval: Interval
    """Errors of the parts added up, as if perfectly correlated: at least 95 %."""
    independent_half_width: float
    """Half the width if the errors of the parts were independent: narrower, and perhaps too narrow."""


class Logged(Section):
    """The entropy that the trainer logged."""

    step: float
    """Steps taken by the policy whose batches these are; of several, their mean."""
    entropy: float
    """As logged."""


class EntropyPath(Section):
    """The entropy over training: measured, predicted, logged."""

    what: str
    """The formula, and what the intervals cover."""
    learning_rates: str
    """Where those of the steps between are from."""
    between: tuple[Between, ...]
    """In the order of the steps."""
    reached: tuple[Reached, ...]
    """The first is the measured entropy."""
    logged: tuple[Logged, ...]
    """Empty: see logged_what."""
    logged_what: str
    """What the trainer's entropy is, or why there is none."""
    agree: int
    """How many of `between` agree."""


class Comparison(Section):
    """Runs side by side."""

    schema_version: Literal[1]
    """Version of this structure; raised when a key changes its meaning or disappears."""
    kind: Literal["checkpoints", "settings"]
    """Checkpoints of one training, or runs that differ otherwise."""
    order: str
    """What the runs are ordered by."""
    findings: tuple[str, ...]
    """In words."""
    warnings: tuple[str, ...]
    """Where the comparison is none, or one with a condition."""
    unit: str
    """Of every entropy and change."""
    runs: tuple[ComparedRun, ...]
    """In that order."""
    differing: tuple[Differing, ...]
    """Every key of the configuration that differs, but the run's name and folder."""
    projections: tuple[GroupOverRuns, ...]
    """Shares by projection; empty: a run has no attribution."""
    layers: tuple[GroupOverRuns, ...]
    """Shares by layer; empty: a run has no attribution."""
    path: EntropyPath | None
    """null: the runs are not checkpoints of one training, or its learning rates are not known."""

    def to_dataframe(self) -> "pd.DataFrame":
        """A row a run, in order; `attrs["unit"]` is the unit of entropies and changes."""
        import pandas as pd

        frame = pd.DataFrame([_record(run) for run in self.runs])
        frame.attrs["unit"] = self.unit
        return frame

    def _repr_html_(self) -> str:
        """For a notebook: the findings, and a table."""
        said = "".join(f"<p>{html.escape(line)}</p>" for line in (*self.warnings, *self.findings))
        head = "".join(
            f"<th>{html.escape(name)}</th>"
            for name in ("run", f"entropy, {self.unit}", "next step", "momentum", "this batch")
        )
        body = "".join(f"<tr>{''.join(map(_cell, _row(run)))}</tr>" for run in self.runs)
        return f"{said}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return f"<td>{html.escape(text)}</td>"


def _row(run: ComparedRun) -> tuple[str, ...]:
    low, high = run.predicted_interval.low, run.predicted_interval.high
    return (
        run.label,
        f"{run.entropy.value:.4g} ± {run.entropy_interval.half_width:.2g}",
        f"{run.predicted.value:+.3g} ({low:+.3g} to {high:+.3g})",
        f"{run.momentum:+.3g}",
        f"{run.update:+.3g}",
    )


def _record(run: ComparedRun) -> dict[str, float | int | str | None]:
    relative, measured = run.relative_interval, run.measured_interval
    found: dict[str, float | int | str | None] = {
        "run": run.name,
        "label": run.label,
        "step": run.step,
        "entropy": run.entropy.value,
        "entropy_low": run.entropy_interval.low,
        "entropy_high": run.entropy_interval.high,
        "next_lr": run.next_lr,
        "predicted": run.predicted.value,
        "predicted_low": run.predicted_interval.low,
        "predicted_high": run.predicted_interval.high,
        "relative": run.relative,
        "relative_low": relative.low if relative else None,
        "relative_high": relative.high if relative else None,
        "measured": run.measured.value if run.measured else None,
        "measured_low": measured.low if measured else None,
        "measured_high": measured.high if measured else None,
        "momentum": run.momentum,
        "decay": run.decay,
        "update": run.update,
        "mean_reward": run.mean_reward,
        "checks_failed": run.checks_failed,
    }
    return found | {one.name: one.value.value for one in run.observables}
