"""Where E is from, for a policy that is already loaded: prompts, or supplied rollouts."""

from collections.abc import Sequence
from typing import NamedTuple

from ..checkpoint.model import Policy
from ..config.schema import Config
from ..rollouts import Rollouts
from ..sampling.large import LargeRows
from ..sampling.sources import Row
from ..sampling.supplied import load_supplied_eval
from .large_prompts import LargePrompts
from .microbatch import longest, require_positions
from .plan import vocabulary
from .prompts import no_prompts, prompts_of


class EvalSource(NamedTuple):
    """The source of E: prompts to sample from, or supplied rollouts."""

    temperature: float
    prompt_ids: Sequence[list[int]]  # none if E is supplied; of very many, read as they are drawn
    supplied: Rollouts | None
    lines: list[str]  # on how the prompts were made


def load_eval(
    config: Config, policy: Policy, rows: Sequence[Row] | LargeRows | None = None
) -> EvalSource:
    """E's prompts or rollouts for a policy that is already loaded; InputError as in `load`.

    The prompts are those of `rows`, by default of prompts.source.
    """
    supplied = load_supplied_eval(config, policy, vocabulary(policy))
    temperature = supplied.temperature if supplied else config.sampling.temperature
    made = no_prompts() if supplied else prompts_of(config, policy, rows)
    if isinstance(made, LargePrompts):
        return EvalSource(temperature, made, None, made.lines)
    require_positions(config, policy, sum(longest(config, made.ids, supplied)))
    return EvalSource(temperature, made.ids, supplied, made.lines)
