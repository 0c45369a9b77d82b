"""What results.json holds of the verdict: what the step does, how sure that is, what makes it."""

from typing import Literal

from .quantity import Section


class Needed(Section):
    """The size of the batches at which the change, were it as estimated, would just differ from 0."""

    kind: Literal["U", "E", "both", "beyond", "no number"]
    """U: prompts of U, E as it is; E: responses of E, U as it is; both: by a common factor; beyond:
    more than ten times both; no number: too near 0 for one, or dropout masks alone hide it."""
    U_prompts: int | None
    """Prompts of U; null: as many as there are, or no number."""
    E_responses: int | None
    """Responses of E; null: as many as there are, or no number."""


class Cause(Section):
    """A part of the step: this batch, momentum, weight decay."""

    name: str
    """Of the part."""
    change: float
    """What it adds to the change."""
    fraction: float | None
    """Of the change; null: the parts have either sign, and fractions would exceed 1."""


class Effect(Section):
    """The change of one quantity by the step, as predicted to first order, and whether it is not 0."""

    name: str
    """entropy, or the observable."""
    unit: str
    """Of change, low and high."""
    at_theta: float
    """Its value before the step, in the unit of the quantity itself."""
    change: float
    """Predicted change, in `unit`."""
    low: float
    """Lower bound of its 95 % interval."""
    high: float
    """Upper bound."""
    over: str
    """What the interval covers."""
    established: bool
    """Whether the interval excludes 0, so that the sign is known."""
    needed: Needed | None
    """null: established already, or nothing changes."""


class Verdict(Section):
    """What the next step does to the entropy and to the observables, and whether to rely on it."""

    step: str
    """Which step: the next one, or one along the v of another rule."""
    eta: float | None
    """Its learning rate; null: not known, and changes are per unit of it."""
    relative: float | None
    """Change over the entropy at theta; null: the learning rate is not known, or the entropy is 0."""
    low: float | None
    """Lower bound of its 95 % interval: that of the change, over the entropy as estimated."""
    high: float | None
    """Upper bound."""
    established: bool
    """Whether the interval excludes 0, so that the sign is known."""
    needed: Needed | None
    """null: established already."""
    entropy: Effect
    """The same in the unit of the entropy."""
    causes: tuple[Cause, ...]
    """Parts of the step, the largest first; those under 0.5 % of all are left out."""
    without_gradient: bool
    """Whether U has no gradient, so that the step is momentum and weight decay alone."""
    observables: tuple[Effect, ...]
    """Beside the entropy; intervals over E, U given."""
    doubts: tuple[str, ...]
    """Why the prediction is not to be relied on; empty: nothing speaks against it."""
