"""results.json as one typed object, and the table of its sweep."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from ..config.estimation import observable_label
from .attribution_sections import AttributionSection
from .cost import CostSection
from .influence_sections import InfluenceSection
from .momentum_sections import MomentumSection
from .observable_sections import Observable
from .quantity import Quantity, Section, StudentInterval
from .sections import (
    CheckResult,
    Conventions,
    Counts,
    FirstOrder,
    LossSection,
    Norms,
    SecondMoments,
    StateEvidence,
)
from .sweep_sections import Fits, SecondOrder, SweepRow
from .verdict_sections import Verdict

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1


class Results(Section):
    """Every number of a run, each with its unit, sign convention and normalisation."""

    schema_version: Literal[1]
    """Version of this structure; raised when a key changes its meaning or disappears."""
    verdict: Verdict | None = None
    """What the step does, how sure that is, what makes it; null: a file of an earlier version."""
    conventions: Conventions
    """Signs, normalisation and settings that every number rests on."""
    counts: Counts
    """Sizes of E, U and the adapter."""
    entropy: Quantity
    """H(theta) on E, of the next-token distribution at the sampling temperature."""
    entropy_interval: StudentInterval
    """Of the entropy, over the draws of E."""
    unlike_the_run: tuple[str, ...] = ()
    """What of the training run's settings the predicted step does not have; empty: nothing is known."""
    loss: LossSection | None = None
    """The loss of U at theta; null: a file of an earlier version."""
    mean_reward: Quantity | None
    """null: no response of U has a reward."""
    first_order: FirstOrder
    """d/d eta of the entropy along v at eta = 0."""
    attribution: AttributionSection | None = None
    """Who makes the derivative; null: attribution.level = "off", or a file of an earlier version."""
    influence: InfluenceSection | None = None
    """Which prompts of E the largest prompts of U change; null: attribution.influence = 0, no gradient,
    or a file of an earlier version."""
    momentum: MomentumSection | None = None
    """Whose momentum; null: nothing is recorded of the steps before."""
    second_order: SecondOrder | None
    """null: measure.second_order = "none", or half precision, which cannot resolve it."""
    norms: Norms
    """Euclidean norms of X, Y and v."""
    clip_coefficient: float
    """Factor by which clipping scales Y; 1: not clipped."""
    second_moments: SecondMoments | None
    """null: the rule reads no optimizer state."""
    state_evidence: StateEvidence | None
    """null: the rule reads no optimizer state."""
    next_lr: Quantity
    """Learning rate of the next step, by the optimizer state or the configuration; 0: not known."""
    sweep: tuple[SweepRow, ...]
    """By ascending learning rate."""
    observables: tuple[Observable, ...] = ()
    """Beside the entropy, in the order of measure.observables."""
    fit: Fits
    """Fits over the sweep, and the numerical floor."""
    checks: tuple[CheckResult, ...]
    """The sanity checks."""
    cost: CostSection
    """What the run took."""

    def _repr_html_(self) -> str:
        from .notebook import results_html  # which the verdict stands between, that is of Results

        return results_html(self)

    def to_dataframe(self) -> "pd.DataFrame":
        """The sweep, a row a learning rate; `attrs["unit"]` is the unit of every change.

        Changes, standard errors and interval bounds are in that unit; predicted_low and predicted_high
        bound the interval over E and U, measured_low, measured_high, difference_low and difference_high
        those over E given U. Of an observable, reward say, reward_predicted and reward_measured with
        their bounds over E given U, in `attrs["units"]["reward"]`. What is null in results.json is NaN.
        """
        import pandas as pd

        frame = pd.DataFrame(
            [{**_record(row), **_of_observables(self.observables, row.eta)} for row in self.sweep]
        )
        numbers = frame.columns.difference(["is_next_lr", "rounding", "verdict", "verdict_reason"])
        frame = frame.astype(dict.fromkeys(numbers, float))
        frame.attrs["unit"] = self.entropy.unit
        frame.attrs["units"] = {observable_label(o.name): o.at_theta.unit for o in self.observables}
        return frame


def _bounds(name: str, interval: StudentInterval | None) -> dict[str, float | None]:
    return {
        f"{name}_low": interval.low if interval else None,
        f"{name}_high": interval.high if interval else None,
    }


def _of_observables(observables: Iterable[Observable], eta: float) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for one in observables:
        name = observable_label(one.name)
        for row in (row for row in one.sweep if row.eta == eta):
            found |= {
                f"{name}_predicted": row.predicted.value,
                **_bounds(f"{name}_predicted", row.interval_given_U),
                f"{name}_measured": row.measured.value,
                **_bounds(f"{name}_measured", row.measured_interval_given_U),
            }
    return found


def _record(row: SweepRow) -> dict[str, float | bool | str | None]:
    resampled = row.resampled
    return {
        "eta": row.eta,
        "is_next_lr": row.is_next_lr,
        "predicted": row.predicted.value,
        "predicted_se_given_U": row.se_given_U.value,
        "predicted_se_total": row.se_total.value,
        **_bounds("predicted", row.interval_total),
        "second_order": row.second_order.value if row.second_order else None,
        "measured": row.measured.value,
        "measured_se_given_U": row.measured_se_given_U.value,
        **_bounds("measured", row.measured_interval_given_U),
        "difference": row.difference.value,
        "difference_se": row.difference_se.value,
        **_bounds("difference", row.difference_interval),
        "ratio": row.ratio.value,
        "ess": row.ess.value,
        "max_weight": row.max_weight.value,
        "clip_fraction": row.clip_fraction,
        "pareto_k": row.pareto_k,
        "verdict": row.verdict,
        "verdict_reason": row.verdict_reason,
        "rounding": row.rounding,
        "resampled": resampled.change.value if resampled else None,
        **_bounds("resampled", resampled.interval if resampled else None),
    }
