"""The size of a microbatch: the longest sequence, the configured size, the limit of the memory."""

from collections.abc import Callable

from funcprobe.policy.forward import Forward
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import Config
from ..console import Narrator
from ..rollouts import Rollouts
from ..sampling.supplied import fresh_length
from . import max_tokens


def longest(config: Config, prompt_ids: list[list[int]], *supplied: Rollouts | None) -> tuple[int, int]:
    """(prompt, response): tokens of the longest sequence that exists or may be sampled.

    `supplied` are E, then U; for a supplied E, responses that may be resampled count as well.
    """
    lengths = [(len(ids), config.sampling.max_new_tokens) for ids in prompt_ids]
    for rollouts in filter(None, supplied):
        pairs = zip(rollouts.prompt_ids, rollouts.response_ids, strict=True)
        lengths += [(len(x), len(y)) for x, y in pairs]
    if config.measure.resample and supplied[0]:
        limit = fresh_length(config, supplied[0])
        lengths += [(len(ids), limit) for ids in supplied[0].prompt_ids]
    return max(lengths, key=sum)


def require_positions(config: Config, policy: Policy, tokens: int) -> None:
    """InputError if a sequence of `tokens` is longer than a microbatch, or than learned positions.

    Rotary positions have no limit (transformers only warns).
    """
    if config.run.max_tokens != "auto" and tokens > config.run.max_tokens:
        raise InputError(
            f"the longest prompt and response may have {tokens} tokens, a microbatch "
            f"{config.run.max_tokens}: raise run.max_tokens, lower sampling.max_new_tokens, or drop "
            "long prompts"
        )
    model_config = policy.model.config.get_text_config()  # of a model that also reads images
    most = getattr(model_config, "max_position_embeddings", None)
    rotary = getattr(model_config, "rope_parameters", None) is not None
    if most is not None and not rotary and tokens > most:
        raise InputError(
            f"the longest prompt and response may have {tokens} tokens, the model has {most} "
            "positions: lower sampling.max_new_tokens, or drop long prompts"
        )


def resolve(
    config: Config,
    policy: Policy,
    forward: Forward,
    sequence: tuple[int, int],
    vocabulary: int,
    narrator: Narrator,
) -> tuple[Config, int]:
    """The configuration with "auto" replaced by the number found for it, and that number.

    `sequence`: tokens of the longest sequence's prompt and response.
    """
    chosen = config.run.max_tokens
    if chosen != "auto":
        return config, chosen
    with narrator.phase("size of microbatches"):
        found = max_tokens.choose(policy.params, forward, *sequence, vocabulary, policy.model.device)
    narrator.say(found.message)
    resolved = config.run.model_copy(update={"max_tokens": found.max_tokens})
    return config.model_copy(update={"run": resolved}), found.max_tokens


def report_halving(narrator: Narrator) -> Callable[[int], None]:
    """Logs how far microbatches were halved, each size once; the next pass starts at the full size."""
    reported: set[int] = set()

    def halved(tokens: int) -> None:
        if tokens not in reported:
            reported.add(tokens)
            narrator.say(
                f"out of memory: microbatches of at most {tokens:,} tokens in the rest of this pass"
            )

    return halved
