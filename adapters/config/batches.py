"""Configuration of E and U: prompts, rewards, sampling, supplied files."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from .section import Positive, Section, Text, size_or_auto


class PromptsConfig(Section):
    """The prompts from which E and U are drawn."""

    source: Text = Field(
        "toy",
        description="JSONL, Parquet or CSV file, folder of a data set (also of save_to_disk), dataset "
        'name ("openai/gsm8k:main"), or "toy".',
    )
    split: str = Field("train", description="Split of a dataset that has several.")
    prompt_column: str = Field("prompt", description="Column with the prompt: text, or messages.")
    template: str | None = Field(
        None,
        description='Text with columns, such as "Q: {prompt} A:"; default: prompt_column alone.',
        examples=["Q: {prompt}\nA:"],
    )
    chat: bool | Literal["auto"] = Field(
        "auto",
        description='Render by the tokenizer\'s chat template, text as a user message. "auto": if it '
        "has one; false: text as it is. Text that contains the template's marks is not rendered again.",
    )
    system_prompt: str | None = Field(
        None,
        description="System message, before what the chat template renders.",
        examples=["Reason step by step."],
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="Arguments of the chat template, as in training: {enable_thinking = false}. The "
        "columns chat_template_kwargs and tools of a row are passed as well.",
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer adds its own (BOS). Default: to text that does not begin "
        "with them, not to what the chat template rendered.",
        examples=[True],
    )
    max_prompt_tokens: Positive | None = Field(
        None, description="Longest prompt that is accepted.", examples=[1024]
    )

    @field_validator("chat", mode="before")
    @classmethod
    def _yes_no_or_auto(cls, value: Any) -> Any:
        if not isinstance(value, bool) and value != "auto":
            raise ValueError('true, false or "auto" is expected')
        return value


class RewardConfig(Section):
    """Rewards of the responses of U, and of E where they are observed."""

    function: str = Field(
        "numeric",
        description='"numeric" (number after ####, else the last), "math" (math-verify), '
        '"module:function" or "path/to/file.py:function" with the signature of TRL or of verl.',
    )
    answer_column: str = Field(
        "answer", description="Column with the reference answer; verl's reward_model has precedence."
    )
    conversational: bool | None = Field(
        None,
        description="A function with TRL's signature takes messages. Default: as in TRL, if the "
        "prompts of the data set are messages.",
        examples=[True],
    )
    correct_at: float = Field(
        1.0, description='Reward from which a response is right, for the observable "correct".'
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
    eos_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        description="Tokens that end a response. Default, as in TRL: the tokenizer's, and those of the "
        "model's generation config.",
        examples=[[2]],
    )
    engine: Literal["batched", "continuous", "server"] = Field(
        "batched",
        description='"batched": prompts of similar length together, until all have ended; '
        '"continuous": transformers\' continuous batching, where one that has ended makes room for '
        'another; both draw the same responses. "server": the one of [server] (docs/sampling.md).',
    )
    generation_batch: Positive | Literal["auto"] = Field(
        "auto",
        description='Sequences generated at once; "auto": as many as half of the free memory holds, at '
        "most 64 on a CPU and 512 on a GPU. The responses are the same for every size.",
    )

    @field_validator("generation_batch", mode="before")
    @classmethod
    def _size_or_auto(cls, value: Any) -> Any:
        return size_or_auto(value)


class RolloutsConfig(Section):
    """Batches supplied as files instead of sampled: .parquet or .jsonl, see docs/rollouts.md."""

    eval: Text | None = Field(
        None,
        description="E; a column sampler_logp gives importance ratios.",
        examples=["rollouts/eval.parquet"],
    )
    update: Text | None = Field(
        None,
        description="U, with rewards; text logged by TRL or verl is tokenised again.",
        examples=["rollouts/update.parquet"],
    )
