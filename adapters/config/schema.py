"""The configuration: a frozen, validated model. Every key is documented here and only here.

`funcprobe init` writes a commented file from these descriptions.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from funcprobe.types import Baseline, Integrand, Per, Rule, Weights

from ..machine.precision import Precision, dtype_of

Positive = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A table of the file: immutable, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _without_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # no path, name or prompt has one
            raise ValueError("contains a NUL character, plain text is expected")
        return value


class RunConfig(Section):
    """Run folder, seed, device and size of microbatches."""

    name: str = Field(
        "probe", pattern=r"^\w[\w.-]*$", max_length=100, description="Name of the run's folder."
    )
    folder: Text = Field("runs", description="Parent folder of the runs.")
    seed: int = Field(0, ge=0, description="Seed of prompts and sampling: same seed, same batches.")
    device: str = Field("auto", description='"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".')
    max_tokens: Positive | Literal["auto"] = Field(
        2048,
        description='Largest number of tokens in a microbatch; more need more memory. "auto": as many '
        "as fit into half of the free memory, found by a trial.",
    )

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _size_or_auto(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (whole and value >= 1):
            raise ValueError('a whole number of at least 1, or "auto", is expected')
        return value


class PolicyConfig(Section):
    """The checkpoint: base model and LoRA adapter."""

    checkpoint: Text = Field(
        "toy", description='Folder (or hub id) with the adapter; "toy": the built-in policy.'
    )
    base: Text | None = Field(None, description="Base model; default: the one saved with the adapter.")
    adapter: str = Field(
        "default",
        pattern=r"^[^.]+$",  # it becomes the name of a torch module
        description='Name of the adapter; unless "default", it is in the subfolder of that name.',
    )
    mode: Literal["lora", "qlora"] = Field(
        "lora",
        description='"lora"; or "qlora": base in 4-bit NF4, quantised on loading or saved so.',
    )
    precision: Precision | None = Field(
        None,
        description='"reference": float64 throughout; "standard": float32; "fast": matrix products of '
        "bfloat16 operands (TF32 on a GPU), for predictions only. Default: determined by dtype.",
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="Of the model; in half precision rounding exceeds most measured changes."
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="Attention kernel; second derivatives use one that supports them."
    )
    trust_remote_code: bool = Field(False, description="Execute modelling code from the hub.")
    max_trainable: Positive = Field(50_000_000, description="More trainable parameters are rejected.")

    @model_validator(mode="before")
    @classmethod
    def _dtype_of_the_precision(cls, table: Any) -> Any:
        return dtype_of(table) if isinstance(table, dict) else table


class OptimizerConfig(Section):
    """Adam's state, and the rule for the direction v from it and the gradient Y on U."""

    state: Text | None = Field(
        None, description="File or folder with the optimizer state; default: in the checkpoint."
    )
    accept_positional: bool = Field(
        False,
        description="Trust the order of a state whose names are not verifiable; see funcprobe inspect.",
    )
    rule: Rule = Field(
        "adamw",
        description='Direction v. "adamw": the exact next step; "precondition": Y/(sqrt(nu)+eps), nu '
        'as saved, no momentum; "sgd": Y.',
    )
    max_grad_norm: float | None = Field(
        None,
        ge=0,
        description="Gradient clipping, as in training; 0: off; default: the value in "
        "optimizer_param_names.json, else 1.",
    )
    lr: float | None = Field(None, gt=0, description="Learning rate of the step; default: the state's.")
    betas: tuple[Decay, Decay] | None = Field(None, description="Adam's; default: the state's.")
    eps: float | None = Field(None, gt=0, description="Adam's; default: the state's.")
    weight_decay: float | None = Field(None, ge=0, le=1e3, description="Default: the state's.")
    checkpoint_step: int | None = Field(
        None, ge=0, description="Steps taken, if the state has none (for bias correction)."
    )
    min_coverage: float = Field(
        0.9, ge=0, le=1, description="Least share of parameters with Adam's moments (coverage)."
    )
    on_low_coverage: Literal["stop", "identity"] = Field(
        "stop", description='Below min_coverage: "stop", or "identity": v = Y, with a warning.'
    )
    max_scale: float = Field(
        1000.0, ge=0, description='Upper bound of 1/(sqrt(nu)+eps), rule "precondition"; 0: off.'
    )


class PromptsConfig(Section):
    """The prompts from which E and U are drawn."""

    source: Text = Field(
        "toy", description='JSONL or Parquet file, dataset name ("openai/gsm8k:main"), or "toy".'
    )
    split: str = Field("train", description="Split of a dataset given by name.")
    prompt_column: str = Field("prompt", description="Column with the prompt.")
    template: str | None = Field(
        None, description='Text with columns, such as "Q: {prompt} A:"; default: prompt_column alone.'
    )
    chat: bool = Field(False, description="Render as a user message in the tokenizer's chat template.")
    system_prompt: str | None = Field(None, description="System message, with chat = true.")
    max_prompt_tokens: Positive | None = Field(None, description="Longest prompt that is accepted.")


class RewardConfig(Section):
    """Rewards of the responses of U."""

    function: str = Field(
        "numeric",
        description='"numeric" (number after ####, else the last), "math" (math-verify), '
        '"module:function" or "path/to/file.py:function" with the signature of TRL or of verl.',
    )
    answer_column: str = Field(
        "answer", description="Column with the reference answer; verl's reward_model has precedence."
    )
    conversational: bool = Field(
        False, description="The function takes messages, as in TRL for conversational datasets."
    )


class SamplingConfig(Section):
    """How E (which estimates the entropy) and U (which makes the step) are sampled from the policy."""

    B_E: Annotated[int, Field(ge=2)] = Field(
        512, description="Number of prompts of E, drawn with replacement, one response each."
    )
    B_U: Annotated[int, Field(ge=2)] = Field(16, description="Number of prompts of U, distinct.")
    G: Annotated[int, Field(ge=2)] = Field(8, description="Number of responses per prompt of U.")
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="Sampling temperature T; the policy is softmax(logits/T)."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 unless E is supplied.")
    top_k: int = Field(0, ge=0, description="Top-k sampling, 0: off; off unless E is supplied.")
    max_new_tokens: Positive = Field(256, description="Longest response in tokens, EOS included.")
    generation_batch: Positive = Field(64, description="Sequences generated at once.")


class RolloutsConfig(Section):
    """Batches supplied as files instead of sampled: .parquet or .jsonl, see docs/rollouts.md."""

    eval: Text | None = Field(None, description="E; a column sampler_logp gives importance ratios.")
    update: Text | None = Field(
        None, description="U, with rewards; text logged by TRL or verl is tokenised again."
    )


class ObjectiveConfig(Section):
    """The RL objective J on U: advantages from rewards, and normalisation of the sum over tokens."""

    preset: Literal["grpo", "dapo", "dr_grpo", "rloo"] = Field(
        "dapo", description="Advantage and normalisation of a method."
    )
    advantage: Literal["mean", "mean_std", "leave_one_out", "rollouts"] | None = Field(
        None,
        description='"mean", "mean_std" or "leave_one_out"; default: the preset\'s. "rollouts": the '
        "column advantage of rollouts.update, unchanged.",
    )
    normalisation: Literal["sequence", "token_mean", "sequence_mean", "longest", "constant"] | None = (
        Field(
            None,
            description='"sequence", "token_mean", "sequence_mean", "longest" or "constant"; default: '
            "the preset's.",
        )
    )
    constant: float | None = Field(
        None,
        gt=0,
        description='L of normalisation "constant", tokens; default: max_new_tokens (sampled U only).',
    )


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
        None, gt=1, description="Upper bound of the importance weights (biased); default: none."
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


class Config(Section):
    """A complete configuration file."""

    run: RunConfig = RunConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    entropy: EntropyConfig = EntropyConfig()
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _sampled_from_the_policy(self) -> "Config":
        if self.rollouts.eval is None and (self.sampling.top_p < 1 or self.sampling.top_k):
            raise ValueError(
                f"sampling.top_p = {self.sampling.top_p:g}, top_k = {self.sampling.top_k}: E must be "
                "sampled with top_p = 1 and top_k = 0, else its importance weights are ratios "
                "to the wrong distribution; set both, or supply E with rollouts.eval"
            )
        return self
