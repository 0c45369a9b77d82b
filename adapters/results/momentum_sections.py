"""What results.json holds on whose momentum moves the entropy."""

from .quantity import Section


class MomentumStep(Section):
    """The part of one earlier step's gradient."""

    step: int
    """Its number in the training run."""
    steps_ago: int
    """1: the last step before the predicted one."""
    share: float
    """<X, v_momentum> of its gradient."""
    fraction: float | None
    """Of the whole momentum part; null: that is 0."""


class MomentumPrompt(Section):
    """What one prompt of an earlier step makes through momentum."""

    prompt_index: int
    """As in the recorded rollouts of that step."""
    text: str
    """Of the prompt, shortened."""
    responses: int
    """Responses to it."""
    share: float
    """Sum over the tokens of its responses."""


class MomentumStepPrompts(Section):
    """One recorded step by its prompts, its gradient recomputed at the parameters before it."""

    step: int
    """Its number."""
    recorded: float
    """<X, v_momentum> of the gradient as recorded, as in by_step."""
    recomputed: float
    """The same by the gradient as recomputed: the sum over all prompts."""
    residual: float
    """recorded - recomputed: rounding, or what the rollouts do not contain (dropout, another loss)."""
    gradient_residual: float
    """|recorded - recomputed| over |recorded|, of the gradients themselves."""
    clip_coefficient: float
    """Factor by which that step clipped its gradient."""
    absolute: float = 0.0
    """Sum of the absolute shares of all its prompts; 0: an earlier version's file, or no gradient."""
    prompts: tuple[MomentumPrompt, ...]
    """The ten largest, by absolute share."""


class MomentumSince(Section):
    """Momentum split at an earlier checkpoint."""

    step: int
    """Steps taken there."""
    before: float
    """<X, v_momentum> of what the first moment held there, decayed."""
    since: float
    """Of the gradients of the steps since."""


class MomentumSection(Section):
    """Whose gradients are in <X, v_momentum>, the momentum part of the derivative along v."""

    unit: str
    """Of every share here."""
    momentum: float
    """<X, v_momentum>, the whole."""
    by_step: tuple[MomentumStep, ...]
    """The recorded steps, newest first; empty: no gradients are recorded. With `before` they sum to
    the whole."""
    before: float | None
    """Of all steps before the first recorded one, and rounding of the saved first moment; null: no
    gradients are recorded."""
    all_steps: bool
    """Whether every step of the run is recorded, so that `before` is rounding alone."""
    unexplained: float | None
    """Norm of what the recorded gradients leave of the first moment, over its own; null: none is
    recorded."""
    by_prompt: tuple[MomentumStepPrompts, ...]
    """The steps of attribution.momentum_prompts, newest first."""
    earlier: MomentumSince | None
    """null: attribution.earlier_checkpoint is not set."""
