"""The size of a microbatch inside training."""

import logging

from funcprobe.policy.forward import Forward
from funcprobe.policy.placement import devices_of

from ..checkpoint.model import Policy
from ..config.schema import Config
from ..stages.max_tokens import Passes, choose
from ..stages.microbatch import Size, longest, smallest
from ..stages.plan import EvalSource, vocabulary
from .together import Together

logger = logging.getLogger(__name__)


def size_of(
    config: Config, policy: Policy, source: EvalSource, forward: Forward, together: Together
) -> Size:
    """run.max_tokens; for "auto" by trials beside what training holds, the least of all processes."""
    asked = config.run.max_tokens
    if asked != "auto":
        return Size(asked)
    sequence = longest(config, source.prompt_ids, source.supplied)
    devices = devices_of(policy.model)
    found = choose(Passes(policy.params, forward, *sequence, vocabulary(policy), devices))
    if together.rank == 0:
        logger.info(found.message)
    own = Size(found.max_tokens, found.recompute, found.curve)
    return smallest(together.gathered(own))
