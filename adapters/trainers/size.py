"""The size of a microbatch inside training."""

import logging
import warnings

from funcprobe.policy.forward import Forward
from funcprobe.policy.placement import devices_of
from funcprobe.types import Batch

from ..checkpoint.model import Policy
from ..config.schema import Config
from ..stages.eval_source import EvalSource
from ..stages.large_prompts import LargePrompts
from ..stages.max_tokens import Passes, choose
from ..stages.microbatch import Size, longest, smallest
from ..stages.plan import vocabulary
from .together import Together

logger = logging.getLogger(__name__)


def sequence_of(config: Config, source: EvalSource, batch: Batch) -> tuple[int, int]:
    """(prompt, response): tokens of the longest sequence; of very many prompts, of those of `batch`."""
    if isinstance(source.prompt_ids, LargePrompts):
        return int(batch.prompt_length_N.max()), config.sampling.max_new_tokens
    return longest(config, source.prompt_ids, source.supplied)


def size_of(
    config: Config, policy: Policy, sequence: tuple[int, int], forward: Forward, together: Together
) -> Size:
    """run.max_tokens; for "auto" by trials beside what training holds, the least of all processes."""
    asked = config.run.max_tokens
    if asked != "auto":
        return Size(asked)
    devices = devices_of(policy.model)
    found = choose(Passes(policy.params, forward, *sequence, vocabulary(policy), devices))
    if together.rank == 0:
        logger.info(found.message)
    own = Size(found.max_tokens, found.recompute, found.curve)
    return smallest(together.gathered(own))


def warning(forward: Forward) -> Forward:
    """The forward that warns where memory runs out."""
    return forward._replace(halved=_warn_of_memory, recomputing=_warn_of_length)


def _warn_of_memory(tokens: int) -> None:
    warnings.warn(f"funcprobe: out of memory: microbatches of {tokens:,} tokens", stacklevel=2)


def _warn_of_length() -> None:
    warnings.warn(
        "funcprobe: out of memory on a single sequence: recomputing layer by layer", stacklevel=2
    )
