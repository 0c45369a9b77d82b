"""The size of a microbatch: the longest sequence, the configured size, the limit of the memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from funcprobe.policy.forward import Forward
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import Config
from ..console import Narrator
from ..machine import memory
from ..rollouts import Rollouts
from ..sampling.supplied import fresh_length
from ..store import Stages
from . import max_tokens
from .large_prompts import known
from .max_tokens import Passes
from .peaks import Curve

STAGE = "size"
STILL = 0.75  # of what is free: an earlier choice that takes no more is kept


def longest(
    config: Config, prompt_ids: Sequence[list[int]], *supplied: Rollouts | None
) -> tuple[int, int]:
    """(prompt, response): tokens of the longest sequence that exists or may be sampled.

    `supplied` are E, then U; for a supplied E, responses that may be resampled count as well. Of a data
    set too large to be read, of the prompts that are drawn.
    """
    lengths = [(len(ids), config.sampling.max_new_tokens) for ids in known(prompt_ids)]
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


class Size(NamedTuple):
    """How large microbatches are, and what their gradients take."""

    max_tokens: int
    recompute: bool = False  # whether gradients recompute layer by layer
    curve: Curve | None = None  # of a gradient's memory; None: not measured


def resolve(
    config: Config,
    passes: Passes,
    narrator: Narrator,
    stages: Stages,
    policy: Mapping[str, Any],
) -> Size:
    """run.max_tokens; for "auto" as an earlier run chose, if that still fits, else by trials.

    An earlier choice is kept since every result depends on it in rounding, so that stored ones would
    be computed again. It is one for the same base, shapes, longest sequence and device; `policy`: what
    determines the distribution (`plan.inputs`), whose adapter's values do not matter here. Of several
    processes the least that one of them finds, which is the choice that is kept.
    """
    asked = config.run.max_tokens
    if asked != "auto":
        return Size(asked)
    shapes = {name: [str(t.dtype), *t.shape] for name, t in passes.params.items()}
    inputs = {key: value for key, value in policy.items() if key != "adapter"} | {
        "shapes": shapes,
        "sequence": [passes.prompt_tokens, passes.response_tokens],
        "layout": passes.forward.layout,
    }
    before = _size(stages.recall(STAGE, inputs), passes.prompt_tokens + passes.response_tokens)
    own = _own(before, passes, narrator)
    size = smallest(stages.world.gathered(own))
    if size[:2] != own[:2]:
        how = ", gradients recomputed layer by layer" if size.recompute else ""
        narrator.say(f"run.max_tokens = {size.max_tokens} (auto): the least of all processes{how}")
    if size != before and size.curve is not None:
        stages.remember(STAGE, inputs, size)
    return size


def _own(before: Size | None, passes: Passes, narrator: Narrator) -> Size:
    """Of this process: an earlier choice that still fits, else by trials."""
    room = memory.free(*passes.devices)
    if before is not None and _peak(before) <= STILL * room:
        how = ", gradients recomputed layer by layer" if before.recompute else ""
        narrator.say(
            f"run.max_tokens = {before.max_tokens} (auto): an earlier run's size{how}; "
            f"{_peak(before) / 2**30:.1f} of {room / 2**30:.1f} GiB free"
        )
        return before
    with narrator.phase("size of microbatches"):
        found = max_tokens.choose(passes, room)
    narrator.say(found.message)
    return Size(found.max_tokens, found.recompute, found.curve)


def smallest(sizes: Sequence[Size]) -> Size:
    """One size for processes that share microbatches; gradients are recomputed if one has to."""
    least = min(sizes, key=lambda size: size.max_tokens)
    return least._replace(recompute=any(size.recompute for size in sizes))


def with_size(config: Config, size: Size) -> Config:
    """The configuration with the number in place of "auto"."""
    return config.model_copy(
        update={"run": config.run.model_copy(update={"max_tokens": size.max_tokens})}
    )


def _size(stored: Any, least: int) -> Size | None:
    """None for what is no size of sequences of `least` tokens."""
    try:
        size, recompute, (fixed, a_token, a_pair, most) = stored
        of = Curve(float(fixed), float(a_token), float(a_pair), int(most))
        usable = int(size) >= least and all(math.isfinite(x) and x >= 0 for x in of)
        return Size(int(size), bool(recompute), of) if usable else None
    except (TypeError, ValueError, OverflowError):  # none, or of another version
        return None


def _peak(size: Size) -> float:
    """Bytes of a microbatch's gradient; infinite if not known."""
    return math.inf if size.curve is None else size.curve.peak(size.max_tokens)


def reporting(forward: Forward, narrator: Narrator) -> Forward:
    """The forward that logs what it does where memory runs out."""
    return forward._replace(halved=report_halving(narrator), recomputing=report_recomputing(narrator))


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


def report_recomputing(narrator: Narrator) -> Callable[[], None]:
    """Logs, once, that a single sequence's gradient did not fit with all of its activations."""
    said: list[str] = []

    def recomputing() -> None:
        if not said:
            said.append("out of memory on a single sequence: recomputing layer by layer in this pass")
            narrator.say(said[0])

    return recomputing
