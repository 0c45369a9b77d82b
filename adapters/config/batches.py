"""Configuration of E and U: prompts, rewards, sampling, supplied files."""

from typing import Annotated

from pydantic import Field

from .section import Positive, Section, Text


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
