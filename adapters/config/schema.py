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
    """A table of the file: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _without_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # no path, name or prompt has one
            raise ValueError("holds a NUL character, plain text is expected")
        return value


class RunConfig(Section):
    """Where the run goes and what it runs on."""

    name: str = Field(
        "probe", pattern=r"^\w[\w.-]*$", max_length=100, description="Name of the run's folder."
    )
    folder: Text = Field("runs", description="Folder that holds the runs.")
    seed: int = Field(0, ge=0, description="Seed of prompts and sampling: same seed, same batches.")
    device: str = Field("auto", description='"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".')
    max_tokens: Positive | Literal["auto"] = Field(
        2048,
        description='Tokens of one microbatch, at most; more needs more memory. "auto": what half of '
        "the free memory holds, found by a trial.",
    )

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _size_or_auto(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (whole and value >= 1):
            raise ValueError('a whole number, at least 1, or "auto" is expected')
        return value


class PolicyConfig(Section):
    """The checkpoint: base model and LoRA adapter."""

    checkpoint: Text = Field(
        "toy", description='Folder (or hub id) with the adapter; "toy" is the built-in policy.'
    )
    base: Text | None = Field(None, description="Base model; default: the one the adapter names.")
    adapter: str = Field(
        "default",
        pattern=r"^[^.]+$",  # it becomes the name of a torch module
        description='Adapter; other than "default": that subfolder.',
    )
    mode: Literal["lora", "qlora"] = Field(
        "lora",
        description='"qlora": the base in 4-bit nf4, double quantisation, or a base saved in nf4.',
    )
    precision: Precision | None = Field(
        None,
        description='"reference": float64 throughout; "standard": float32; "fast": matrix products of '
        "bfloat16 operands (TF32 on a GPU), for predictions alone. Default: as dtype says.",
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="In bfloat16 and float16 measured changes drown in rounding."
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="Attention; second derivatives get a kernel that has them either way."
    )
    trust_remote_code: bool = Field(False, description="Run modelling code that the hub id brings.")
    max_trainable: Positive = Field(50_000_000, description="Refuse more trainable ones than this.")

    @model_validator(mode="before")
    @classmethod
    def _dtype_of_the_precision(cls, table: Any) -> Any:
        return dtype_of(table) if isinstance(table, dict) else table


class OptimizerConfig(Section):
    """Adam's state and the rule that makes the step v of it and of the gradient Y on U."""

    state: Text | None = Field(
        None, description="File or folder with the optimizer's state; default: the checkpoint's own."
    )
    accept_positional: bool = Field(
        False,
        description="Trust the order of a state without names, of equal shapes; see funcprobe inspect.",
    )
    rule: Rule = Field(
        "adamw",
        description='"adamw": the exact next step; "precondition": Y/(sqrt(nu)+eps), nu as saved, no '
        'momentum; "sgd": Y.',
    )
    max_grad_norm: float | None = Field(
        None,
        ge=0,
        description="Gradient clipping, as the run was trained; 0: off; default: what "
        "optimizer_param_names.json says, else 1.",
    )
    lr: float | None = Field(None, gt=0, description="Next step's learning rate; default: the file's.")
    betas: tuple[Decay, Decay] | None = Field(None, description="Default: the file's.")
    eps: float | None = Field(None, gt=0, description="Default: the file's.")
    weight_decay: float | None = Field(None, ge=0, le=1e3, description="Default: the file's.")
    checkpoint_step: int | None = Field(
        None, ge=0, description="Steps taken, where the file has none (for bias correction)."
    )
    min_coverage: float = Field(
        0.9, ge=0, le=1, description="Least share of parameters that must have Adam state."
    )
    on_low_coverage: Literal["stop", "identity"] = Field(
        "stop", description='Below min_coverage: "stop", or "identity", the raw gradient (said so).'
    )
    max_scale: float = Field(
        1000.0, ge=0, description='Cap of 1/(sqrt(nu)+eps) for "precondition"; 0: off.'
    )


class PromptsConfig(Section):
    """The prompts E and U are drawn from."""

    source: Text = Field(
        "toy", description='JSONL or Parquet file, dataset name ("openai/gsm8k:main"), or "toy".'
    )
    split: str = Field("train", description="Split of a dataset by name.")
    prompt_column: str = Field("prompt", description="Column with the question.")
    template: str | None = Field(
        None, description='Text around columns, as "Q: {prompt} A:"; default: the column alone.'
    )
    chat: bool = Field(False, description="Render as a user message in the tokenizer's chat template.")
    system_prompt: str | None = Field(None, description="System message, with chat = true.")
    max_prompt_tokens: Positive | None = Field(None, description="Refuse longer prompts than this.")


class RewardConfig(Section):
    """Rewards of U's responses."""

    function: str = Field(
        "numeric",
        description='"numeric" (last number, #### first), "math" (math-verify), "module:function", '
        'or "path/to/file.py:function", called as TRL or, by its parameters, as verl calls it.',
    )
    answer_column: str = Field(
        "answer", description="Column with the reference answer; verl's reward_model goes before it."
    )
    conversational: bool = Field(
        False,
        description="Your function takes messages, as in TRL where the dataset's prompts are messages.",
    )


class SamplingConfig(Section):
    """How E (which estimates the entropy) and U (which makes the step) are sampled from the policy."""

    B_E: Annotated[int, Field(ge=2)] = Field(
        512, description="Prompts of E, drawn with replacement, one response each."
    )
    B_U: Annotated[int, Field(ge=2)] = Field(16, description="Prompts of U, distinct.")
    G: Annotated[int, Field(ge=2)] = Field(8, description="Responses per prompt of U.")
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="Of sampling; the policy is softmax(logits/T)."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Must stay 1 where E is sampled here.")
    top_k: int = Field(0, ge=0, description="0: off. Must stay off where E is sampled here.")
    max_new_tokens: Positive = Field(256, description="Longest response, its end of sequence included.")
    generation_batch: Positive = Field(64, description="Sequences generated at once.")


class RolloutsConfig(Section):
    """Batches brought from elsewhere instead of being sampled (.parquet or .jsonl, see README)."""

    eval: Text | None = Field(None, description="E; its sampler_logp column makes the ratios, if any.")
    update: Text | None = Field(
        None, description="U, with rewards; TRL's completions and verl's dumps are guessed from text."
    )


class ObjectiveConfig(Section):
    """The RL objective J on U: rewards to advantages, and what the sum over tokens is divided by."""

    preset: Literal["grpo", "dapo", "dr_grpo", "rloo"] = Field(
        "dapo", description="Advantage and normalisation by the name of the method."
    )
    advantage: Literal["mean", "mean_std", "leave_one_out", "rollouts"] | None = Field(
        None,
        description='"mean", "mean_std" or "leave_one_out"; default: the preset\'s. "rollouts": the '
        "column advantage of rollouts.update, as it is.",
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
        description='L of normalisation "constant"; default: max_new_tokens (none if U is brought).',
    )


class EntropyConfig(Section):
    """Which estimator of the entropy."""

    per: Per = Field("token", description='"token" (nats per token, as trainers log) or "sequence".')
    integrand: Integrand = Field(
        "rao_blackwell", description='Full next-token entropy, or "sampled": -log p of the token.'
    )
    weights: Weights = Field(
        "per_decision", description='Importance weight of the prefix, or of the whole "sequence".'
    )
    clip: float | None = Field(
        None, gt=1, description="Upper bound of importance weights; biases, so off by default."
    )
    baseline: Baseline = Field(
        "auto",
        description='Control variate of the score term: "ridge", "position", "entropy" or "none"; '
        '"auto": ridge, but none for the sampled integrand, with a clip, for fewer than three prompts '
        "and where E brings sampler_logp.",
    )

    @model_validator(mode="after")
    def _place_for_the_baseline(self) -> "EntropyConfig":
        if self.baseline not in {"auto", "none"} and (
            self.integrand == "sampled" or self.clip is not None
        ):
            found = 'integrand = "sampled"' if self.integrand == "sampled" else f"clip = {self.clip:g}"
            raise ValueError(
                f'baseline = "{self.baseline}" with {found}, whose expectation it would change: leave '
                'one of the two out, or set baseline = "none"'
            )
        return self


class MeasureConfig(Section):
    """Where the true change is measured."""

    etas: tuple[float, ...] = Field(
        (1e-6, 3e-6, 1e-5, 3e-5, 1e-4), description="Learning rates of the sweep."
    )
    next_lr: bool = Field(True, description="Measure at the next step's own learning rate as well.")
    second_order: Literal["difference", "exact", "none"] = Field(
        "difference",
        description='Second derivative along v: by a symmetric "difference" of two changes, "exact" '
        '(in Taylor mode, the price of some five forwards instead of two), or "none".',
    )
    resample: bool = Field(
        False, description="Where weights say too little, sample responses at theta + eta v."
    )

    @field_validator("etas")
    @classmethod
    def _positive_and_distinct(cls, etas: tuple[float, ...]) -> tuple[float, ...]:
        if not etas:
            raise ValueError("the list is empty, at least one learning rate is expected")
        for eta in etas:
            if not (eta > 0 and math.isfinite(eta)):
                raise ValueError(f"eta {eta:g} is not positive: 0 changes nothing, leave it out")
        if twice := [eta for i, eta in enumerate(etas) if eta in etas[:i]]:
            raise ValueError(f"eta {twice[0]:g} stands twice, distinct values are expected")
        return etas


class Config(Section):
    """A whole configuration file."""

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
                "against the wrong distribution; set both, or bring E with rollouts.eval"
            )
        return self
