"""Configuration of the objective, the entropy estimator, the measurement and the attribution."""

import math
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from funcprobe.types import Baseline, Integrand, Per, Weights

from .section import Section, Text

OBSERVABLES = ("reward", "correct", "length", "stop", "kl_base", "kl_base_sampled")


def observable_label(name: str) -> str:
    """An observable as it is printed: of a function its own name."""
    return name.rpartition(":")[2]


class ObjectiveConfig(Section):
    """The RL objective J on U: advantages from rewards, normalisation of the sum over tokens; a loss.

    Without `loss` J is that of the preset while the policy is the one that sampled: every importance
    ratio is 1, and there is no KL term and no entropy bonus.
    """

    preset: Literal["grpo", "dapo", "dr_grpo", "rloo"] = Field(
        "dapo", description="Advantage and normalisation of a method."
    )
    advantage: Literal["mean", "mean_std", "leave_one_out", "rollouts"] | None = Field(
        None,
        description='"mean", "mean_std" or "leave_one_out"; default: the preset\'s. "rollouts": the '
        "column advantage of rollouts.update, unchanged.",
        examples=["mean_std"],
    )
    normalisation: Literal["sequence", "token_mean", "sequence_mean", "longest", "constant"] | None = (
        Field(
            None,
            description='"sequence", "token_mean", "sequence_mean", "longest" or "constant"; default: '
            "the preset's.",
            examples=["token_mean"],
        )
    )
    constant: float | None = Field(
        None,
        gt=0,
        description='L of normalisation "constant", tokens; default: max_new_tokens (sampled U only).',
        examples=[256.0],
    )
    loss: Text | None = Field(
        None,
        description='The loss of a trainer, "trl" or "verl", or one\'s own, "path/to/file.py:function" '
        "(docs/losses.md), with its own normalisation. Default: J of the preset, or the loss that the "
        "run's sidecar records.",
        examples=["trl"],
    )
    settings: dict[str, Any] = Field(
        {},
        description="Settings of the loss by the trainer's names, as in {loss_type = "
        '"cispo", beta = 0.04}; of one\'s own, keyword arguments.',
    )

    @field_validator("settings")
    @classmethod
    def _writable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Infinity as text, which every format has."""
        for name, value in settings.items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} is nan, a number is expected")
        infinite = {k: str(v) for k, v in settings.items() if isinstance(v, float) and math.isinf(v)}
        return settings | infinite


class StepConfig(Section):
    """What of the step is random beside U."""

    masks: int = Field(
        0,
        ge=0,
        description="Dropout masks (at least 2; 0: none) for a run that trains with dropout, such as "
        "lora_dropout: Y and v are means over them, by as many gradients of U instead of one, and the "
        "spread over masks enters the interval.",
    )

    @field_validator("masks")
    @classmethod
    def _enough_for_a_spread(cls, masks: int) -> int:
        if masks == 1:
            raise ValueError("1 mask has no spread: at least 2 are expected, or 0 for none")
        return masks


class EntropyConfig(Section):
    """The estimator of the entropy."""

    per: Per = Field("token", description='"token" (nats per token, as trainers log) or "sequence".')
    integrand: Integrand = Field(
        "rao_blackwell", description='Next-token entropy; or "sampled": -log p of the sampled token.'
    )
    weights: Weights = Field(
        "per_decision", description='Importance weight of the prefix; or "sequence": of the response.'
    )
    clip: float | None = Field(
        None,
        gt=1,
        description="Upper bound of the importance weights (biased); default: none.",
        examples=[5.0],
    )
    baseline: Baseline = Field(
        "auto",
        description='Control variate of the score term: "ridge", "position", "entropy" or "none"; '
        '"auto": ridge, but none for the sampled integrand, with a clip, for fewer than three prompts '
        "and for an E with sampler_logp.",
    )

    @model_validator(mode="after")
    def _place_for_the_baseline(self) -> "EntropyConfig":
        if self.baseline not in {"auto", "none"} and (
            self.integrand == "sampled" or self.clip is not None
        ):
            found = 'integrand = "sampled"' if self.integrand == "sampled" else f"clip = {self.clip:g}"
            raise ValueError(
                f'baseline = "{self.baseline}" with {found}, whose expectation it would change: remove '
                'one of the two, or set baseline = "none"'
            )
        return self


class AttributionConfig(Section):
    """Who makes the predicted change: prompts and tokens of U and E, modules, momentum."""

    level: Literal["summary", "tokens", "off"] = Field(
        "tokens",
        description='"summary": shares and marginals by part of the step, prompt, sequence and module, '
        'by one more pass over U; "tokens": also a table of every token (docs/results.md), which the '
        'responses of the report are coloured by; or "off".',
    )
    influence: int = Field(
        0,
        ge=0,
        description="Number of prompts of U, those of the largest shares, whose influence on every "
        "prompt of E is computed, with the share's interval and modules; a pass over E each, 0: none.",
    )
    gradients: Text | None = Field(
        None,
        description="Folder with the gradients of the steps before (record_rollouts with gradients=K), "
        "which split momentum by step. Default: beside rollouts.update, or in the checkpoint, if any.",
        examples=["rollouts"],
    )
    momentum_prompts: int = Field(
        0,
        ge=0,
        description="Recorded steps, from the last one, whose part in momentum is split by their "
        "prompts, by two passes over the rollouts of each.",
    )
    earlier_checkpoint: Text | None = Field(
        None,
        description="An earlier checkpoint of the same run, which splits momentum into before and "
        "after it.",
        examples=["outputs/checkpoint-5"],
    )

    @model_validator(mode="after")
    def _influence_needs_shares(self) -> "AttributionConfig":
        if self.influence and self.level == "off":
            raise ValueError(
                f"influence = {self.influence} is of the prompts of the largest shares, and level is "
                '"off": set level to "tokens", or influence to 0'
            )
        return self


class MeasureConfig(Section):
    """Measurement of the entropy change at theta + eta v."""

    etas: tuple[float, ...] = Field(
        (1e-6, 3e-6, 1e-5, 3e-5, 1e-4), description="Learning rates eta of the sweep."
    )
    next_lr: bool = Field(True, description="Measure at the learning rate of the next step as well.")
    second_order: Literal["difference", "exact", "none"] = Field(
        "difference",
        description='Second derivative along v: symmetric "difference" of two changes, "exact" (Taylor '
        'mode, at the cost of about five forwards instead of two), or "none".',
    )
    resample: bool = Field(
        False, description='Where the verdict is "resample", sample responses at theta + eta v.'
    )

    observables: tuple[Text, ...] | None = Field(
        None,
        description='What else to observe on E: "reward", "correct", "length" (tokens), "stop" (share '
        'that ends with an EOS), "kl_base" (KL to the base policy, the adapter off), '
        '"kl_base_sampled", "path/to/file.py:function". Default: reward where E has '
        "one, or where it is sampled and the function of U's rewards, or one's own, scores it; length.",
        examples=[["reward", "length", "kl_base"]],
    )

    @field_validator("observables")
    @classmethod
    def _known_and_distinct(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for i, name in enumerate(names or ()):
            if observable_label(name) == "entropy":
                raise ValueError(f"{name} is always observed: remove it, or rename the function")
            if name not in OBSERVABLES and ":" not in name:
                near = [f"did you mean {c}? " for c in get_close_matches(name, OBSERVABLES, n=1)]
                raise ValueError(
                    f"{name!r} is no observable: {''.join(near)}known are {', '.join(OBSERVABLES)}, "
                    '"module:function" and "path/to/file.py:function"'
                )
            if observable_label(name) in map(observable_label, (names or ())[:i]):
                raise ValueError(f"{observable_label(name)} occurs twice, distinct names are expected")
        return names

    @field_validator("etas")
    @classmethod
    def _positive_and_distinct(cls, etas: tuple[float, ...]) -> tuple[float, ...]:
        if not etas:
            raise ValueError("the list is empty, at least one learning rate is expected")
        for eta in etas:
            if not (eta > 0 and math.isfinite(eta)):
                raise ValueError(f"eta is {eta:g}, a positive, finite number is expected")
        if twice := [eta for i, eta in enumerate(etas) if eta in etas[:i]]:
            raise ValueError(f"eta {twice[0]:g} occurs twice, distinct values are expected")
        return etas
