"""What results.json holds on which prompts of U change the entropy on which prompts of E."""

from .attribution_sections import Share
from .quantity import Section


class ModuleOfShare(Section):
    """What a module holds of a prompt's share."""

    name: str
    """The module."""
    share: float
    """<X, P Y_m> restricted to its tensors."""


class InfluentialPrompt(Section):
    """A prompt of U, with the error of its share."""

    prompt_index: int
    """As in rollouts/update.parquet."""
    text: str
    """Of the prompt, shortened."""
    share: Share
    """<X, P Y_m>, with the exact error over the draws of E, U given: the estimator along P Y_m."""
    region: str | None
    """The fewest modules of adjacent layers that hold at least half of it; null: spread over more."""
    modules: tuple[ModuleOfShare, ...]
    """The ten largest, by absolute share."""


class PairOfPrompts(Section):
    """What a prompt of U adds to the derivative through the responses to a prompt of E."""

    E_prompt: int
    """As in rollouts/eval.parquet."""
    E_text: str
    """Of the prompt, shortened."""
    U_prompt: int
    """As in rollouts/update.parquet."""
    U_text: str
    """Of the prompt, shortened."""
    influence: float
    """<X_n, P Y_m>; over all prompts of E they sum to the share."""


class InfluenceSection(Section):
    """The prompts of U of the largest shares: where in E they act, P fixed, without masks."""

    unit: str
    """Of every share and influence here."""
    prompts: tuple[InfluentialPrompt, ...]
    """attribution.influence of them, largest first."""
    pairs: tuple[PairOfPrompts, ...]
    """The ten that matter most, among these prompts of U and all of E."""
