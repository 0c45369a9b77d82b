"""What results.json holds on who makes the predicted change."""

from typing import Literal

from .lifetime import LifetimeSection
from .quantity import Section, StudentInterval


class Share(Section):
    """A part of the derivative along v, with its error over E, U given."""

    share: float
    """In the unit of the attribution."""
    se: float | None
    """Standard error over the draws of E; null: not known without a further pass."""
    interval: StudentInterval | None
    """Of the share; null: not known."""
    indistinguishable_from_0: bool | None
    """Whether the interval holds 0; null: not known."""


class GroupShare(Section):
    """The part of some tensors of the adapter, by the parts of v."""

    name: str
    """The module, layer, projection or factor."""
    total: Share
    """<X, v> restricted to these tensors."""
    momentum: float
    """Of Adam's first moment."""
    decay: float
    """Of weight decay."""
    update: Share
    """Of this batch's gradient."""


class Region(Section):
    """The fewest modules of adjacent layers that hold at least half of a part."""

    name: str
    """In words, as mlp.down_proj of layers 20 to 29."""
    modules: int
    """Modules in it."""
    of_modules: int
    """Modules of the adapter."""
    fraction: float
    """Its share over the whole part's."""
    total: Share
    """Its share."""
    spread: float = 1.0
    """Sum of the absolute shares of all modules over that of their sum: above 1 they have either sign,
    and `fraction` is of a difference."""


class PromptOfU(Section):
    """What a prompt of U and its responses make."""

    prompt_index: int
    """As in rollouts/update.parquet."""
    text: str
    """Of the prompt, shortened: its last user message, or its text."""
    responses: int
    """Responses to it."""
    tokens: int
    """Response tokens."""
    mean_reward: float | None
    """Of its responses; null: none has a reward."""
    right: int | None
    """Responses with the larger reward, where all rewards of U are one of two and reward.correct_at is
    between them; else null."""
    above_mean: int | None
    """Responses with a reward above the prompt's mean; null: none has a reward."""
    advantage_low: float | None
    """Smallest advantage; null: not known."""
    advantage_high: float | None
    """Largest advantage; null: not known."""
    share: float
    """Sum of its tokens' shares."""
    marginal: float
    """Derivative of the prediction in the weight of all its tokens."""
    later: float | None = None
    """What its gradient does through momentum in later steps, if nothing else changes; null: as
    `lifetime.factor`."""


class PromptOfE(Section):
    """What the responses to a prompt of E add to the derivative: where the entropy changes."""

    prompt_index: int
    """As in rollouts/eval.parquet."""
    text: str
    """Of the prompt, shortened."""
    responses: int
    """Responses to it."""
    tokens: int
    """Response tokens."""
    total: Share
    """Sum of its tokens' shares; the error is that over all draws, as large as the share itself for a
    prompt that was drawn once."""


class Family(Section):
    """One way in which shares sum to the derivative."""

    name: str
    """What the shares belong to."""
    sum: float
    """Of the shares."""
    residual: float
    """Sum less derivative."""
    sum_absolute: float
    """Of the absolute shares, to which rounding is relative."""
    relative: float
    """|residual| over sum_absolute; in float32 about 1e-6."""


class AttributionSection(Section):
    """The derivative along v by what makes it, in `unit`; each family of shares sums to it."""

    level: Literal["summary", "tokens"]
    """attribution.level."""
    unit: str
    """Of every share, marginal and standard error here."""
    momentum: Share
    """<X, v_momentum>: earlier steps' gradients."""
    decay: Share
    """<X, v_decay>: weight decay."""
    update: Share
    """<X, P Y>: this batch, P fixed."""
    whole: Share
    """<X, v>, with the error by blocks; that by draws is first_order.se_given_U."""
    lifetime: LifetimeSection | None = None
    """The part of this batch now, and what its gradient does through momentum in later steps; null: a
    file of an earlier version."""
    dropout: float
    """What masks of dropout make of `update`; rounding without masks. With U's shares it sums to it."""
    marginals: Share
    """Derivative of the prediction in a common weight of all of U: the sum of its marginals, which
    answer through the second moment and the clip as well."""
    marginals_less_shares: Share
    """marginals - update, with the error of the difference."""
    marginals_differ: bool
    """Whether they differ by more than that error, and by more than 1 %."""
    U_prompts: tuple[PromptOfU, ...]
    """The ten largest, by absolute share."""
    U_prompts_absolute: float = 0.0
    """Sum of the absolute shares of all prompts of U; 0: an earlier version's file, or no gradient."""
    modules: tuple[GroupShare, ...]
    """The ten largest, by absolute share; modules.parquet has all."""
    layers: tuple[GroupShare, ...]
    """By layer."""
    projections: tuple[GroupShare, ...]
    """By projection, over all layers."""
    factors: tuple[GroupShare, ...]
    """By A and B of LoRA, and what else the adapter has."""
    region: Region | None
    """Where the derivative is; null: spread over more than two fifths of the modules."""
    update_region: Region | None
    """Where the part of this batch is; null: spread, or nothing."""
    E_prompts: tuple[PromptOfE, ...]
    """The ten largest, by absolute share."""
    direct: Share
    """By the entropy of the tokens' own distributions."""
    score: Share
    """By tokens that become more or less probable, and with them the entropy after them."""
    control: Share
    """By the baseline's control variate of the score term."""
    families: tuple[Family, ...]
    """Every family of shares, with its residual."""
    blocks: int
    """Blocks of E from which the errors of the parts of v, of marginals and of modules are."""
