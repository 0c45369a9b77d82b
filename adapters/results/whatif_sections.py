"""whatif.json as one typed object: every rule on the same E and U, the frontier, what was solved."""

from typing import Literal, Self

from pydantic import model_validator

from .cost import CostSection
from .quantity import Interval, Quantity, Section, StudentInterval
from .sections import Conventions, Counts

SCHEMA_VERSION = 1


class ChangeSection(Section):
    """The change of one observable at theta + eta v of a rule, and against the run's own rule."""

    predicted: Quantity
    """eta <X, v>: to first order, with the rule's exact v."""
    measured: Quantity
    """By self-normalised importance sampling at theta + eta v."""
    measured_se_given_U: Quantity
    """Standard error of the measured change over the sampling units of E."""
    measured_interval_given_U: StudentInterval | None
    """Of the measured change; null where the weights' verdict is "resample"."""
    missed: Quantity
    """measured - predicted: curvature, and what the prediction lacks."""
    agrees: bool | None
    """Whether the predicted change lies in the measured interval; null without one."""
    difference: Quantity
    """Measured change less that of the run's own rule, on the same samples."""
    difference_se: Quantity
    """Its standard error over the sampling units of E, from differences of influence values."""
    difference_interval: StudentInterval | None
    """Of the difference; null where a verdict of the two is "resample"."""


class RuleRow(Section):
    """What the next step does under one rule."""

    rule: str
    """Name and argument; "own": the run's."""
    about: str
    """What the rule does, and the paper that it is from."""
    chosen_on_E: bool
    """Whether it reads shares or marginals, which are of the same E that measures it."""
    touched: Quantity
    """Share of the tokens of J whose coefficients differ from the run's own."""
    weight: Quantity
    """Sum of |c| over U's tokens, relative to the run's own, or itself where that is 0; c: coefficients
    of log-probabilities."""
    entropy_weight: Quantity
    """Sum of |d| over U's tokens, relative to the run's sum of |c|, or itself where that is 0; d:
    coefficients of entropies."""
    clip_coefficient: float
    """Factor by which clipping scales the rule's Y; 1: not clipped."""
    entropy: ChangeSection
    """Of the policy's entropy."""
    reward: ChangeSection | None
    """Of the mean reward; null: E has no rewards."""
    ess: Quantity
    """Effective sample size of the importance weights."""
    clipped: int
    """Sequences whose weight was reduced to entropy.clip."""
    pareto_k: float | None
    """Tail of the weights; null: see verdict_reason."""
    verdict: Literal["trust", "caution", "resample"]
    """Whether the measured changes and their errors are reliable, as in a run's sweep."""
    verdict_reason: str
    """One line."""
    on_frontier: bool
    """Whether no other rule has both a higher entropy and a higher reward, as measured."""


class LeftOut(Section):
    """A rule of the default list that this run cannot have."""

    rule: str
    """Name and argument."""
    reason: str
    """What it lacks."""


class FrontierPoint(Section):
    """A rule as a point of a plot, with half the widths of the 95 % intervals."""

    rule: str
    """Name and argument."""
    entropy: float
    """Measured change, in the frontier's entropy_unit."""
    entropy_half_width: float | None
    """null where the weights' verdict is "resample"."""
    reward: float
    """Measured change, in the frontier's reward_unit."""
    reward_half_width: float | None
    """null where the weights' verdict is "resample"."""
    dominated: bool
    """Whether another rule has more of both."""


class Frontier(Section):
    """Change of entropy against change of reward: what a plot needs."""

    what: str
    """How to read it."""
    entropy_unit: str
    """Unit of the abscissa."""
    reward_unit: str
    """Unit of the ordinate."""
    points: tuple[FrontierPoint, ...]
    """Every rule with a reliable measurement, in the order of the table."""


class Solution(Section):
    """The coefficient at which the predicted change of the entropy has a given value."""

    rule: str
    """The rule whose coefficient was looked for."""
    target: Quantity
    """The value asked for."""
    coefficient: float
    """Of the rule; the row of the table that has it is `row`."""
    coefficient_interval: Interval | None
    """95 %, over E given U: of the measured change there, over the slope of the predicted change in the
    coefficient; null for a share, which changes in steps."""
    row: str
    """Name of its row."""
    method: str
    """How it was found."""
    reachable: tuple[float, float]
    """Lowest and highest predicted change over the coefficients tried, in the target's unit."""
    passes: int
    """Gradient passes over U that it took."""
    predicted_missed: Quantity
    """Predicted change less the target."""
    measured_missed: Quantity
    """Measured change less the target."""
    within_error: bool | None
    """Whether the measured change is the target, within its 95 % interval; null without one."""


class WhatIf(Section):
    """Rules on one E and U: predicted and measured changes of entropy and reward."""

    schema_version: Literal[1]
    """Version of this structure; raised when a key changes its meaning or disappears."""
    conventions: Conventions
    """Signs, normalisation and settings that every number rests on."""
    counts: Counts
    """Sizes of E, U and the adapter."""
    inputs: dict[str, str] | None = None
    """The seed, and SHA-256 of what manifest.json has on checkpoint, optimizer, prompts, rollouts, by
    which a run and its rules are known to belong together; null: a file of an earlier version."""
    unlike_the_run: tuple[str, ...]
    """What of the training run's settings the predicted step does not have; empty: nothing is known."""
    learning_rate: Quantity
    """eta, of every step here."""
    is_next_lr: bool
    """Whether it is that of the next step."""
    linear_until: Quantity | None
    """Where the quadratic term of the run's own step is 10 % of the linear one; null: no stored run of
    this configuration has measured it."""
    entropy: Quantity
    """H(theta) on E."""
    entropy_interval: StudentInterval
    """Of the entropy, over the draws of E."""
    reward: Quantity | None
    """Mean reward at theta on E; null: E has no rewards."""
    rules: tuple[RuleRow, ...]
    """The run's own rule first, then as asked for; last the one that was solved for."""
    left_out: tuple[LeftOut, ...]
    """Rules of the default list that this run cannot have."""
    frontier: Frontier | None
    """null: E has no rewards."""
    solution: Solution | None
    """null: nothing was solved for."""
    limits: tuple[str, ...]
    """What the predictions rest on."""
    findings: tuple[str, ...]
    """In words: which rule keeps the entropy, at what price in reward."""
    cost: CostSection
    """What the command took."""

    @model_validator(mode="after")
    def _has_own(self) -> Self:
        if not self.rules or self.learning_rate.value <= 0:
            raise ValueError("rules, of a learning rate above 0, begin with the run's own")
        return self

    def _repr_html_(self) -> str:
        from .notebook import whatif_html  # which imports what these sections are part of

        return whatif_html(self)
