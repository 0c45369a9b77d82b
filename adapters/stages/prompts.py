"""The prompts of a run: loaded, rendered, encoded, shown."""

from collections.abc import Sequence

from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..checkpoint.vocabulary import require_rows
from ..config.schema import Config
from ..console import excerpt
from ..rollouts import Rollouts
from ..sampling.answers import ground_truth_of_verl
from ..sampling.drawing import eval_index, update_index
from ..sampling.encoding import encode_prompts
from ..sampling.large import LargeRows, open_rows
from ..sampling.prompts import load_prompts, missing_column, render_prompts
from ..sampling.rewards import BUILT_IN
from ..sampling.sources import Row
from .large_prompts import Drawn, LargePrompts, Made


def no_prompts() -> Made:
    """For batches that are supplied."""
    return Made([], [], [])


def prompts_of(
    config: Config, policy: Policy, rows: Sequence[Row] | LargeRows | None = None
) -> Made | LargePrompts:
    """Of `rows`, by default those of prompts.source; read as they are drawn if they are very many.

    InputError if they cannot be used.
    """
    chosen = config.prompts
    where = chosen.source if rows is None else "the data set"
    rows = open_rows(chosen.source, chosen.split) if rows is None else rows
    if not isinstance(rows, LargeRows):
        return encoded(config, policy, rows, where)

    def make(of: Sequence[Row], numbers: Sequence[int]) -> Made:
        return encoded(config, policy, of, where, numbers)

    return LargePrompts(rows, where, make)


def encoded(
    config: Config,
    policy: Policy,
    rows: Sequence[Row],
    where: str,
    numbers: Sequence[int] | None = None,
) -> Made:
    """Of rows. InputError, with `where` they are from and their `numbers`, if they cannot be used."""
    chosen = config.prompts
    examples = load_prompts(
        rows,
        prompt_column=chosen.prompt_column,
        split=chosen.split,
        template=chosen.template,
        where=where,
        numbers=numbers,
    )
    prompts, made = render_prompts(
        examples,
        policy.tokenizer,
        chat=chosen.chat,
        system_prompt=chosen.system_prompt,
        chat_template_kwargs=chosen.chat_template_kwargs,
    )
    ids, special = encode_prompts(
        prompts,
        policy.tokenizer,
        add_special_tokens=chosen.add_special_tokens,
        max_prompt_tokens=chosen.max_prompt_tokens,
    )
    require_rows(ids, policy.tokenizer, policy.model.get_input_embeddings().weight.shape[0])
    return Made(prompts, ids, [*made, *special])


def _drawn(config: Config, prompts: LargePrompts) -> Made:
    """Those that E and U are of, and the first two."""
    places = {0, 1}
    if config.rollouts.eval is None:
        places |= set(eval_index(config, len(prompts)))
    if config.rollouts.update is None:
        places |= set(update_index(config, len(prompts)))
    found, count = prompts.take(places), len(prompts)
    given = Drawn({i: prompt for i, (prompt, _) in found.items()}, count)
    return Made(given, Drawn({i: ids for i, (_, ids) in found.items()}, count), prompts.lines)


def sampled_from(config: Config, policy: Policy) -> tuple[Made, LargePrompts | None]:
    """The prompts from which E and U are drawn, and the first of them in a line.

    Of a data set too large to be read, which is returned beside them, those that are drawn. InputError
    also for too few of them, and for prompts that do not suit the reward.
    """
    made, source = prompts_of(config, policy), config.prompts.source
    every = made if isinstance(made, LargePrompts) else None
    found = _drawn(config, made) if isinstance(made, LargePrompts) else made
    prompts, samples_update = found.prompts, config.rollouts.update is None
    if samples_update and len(prompts) < config.sampling.B_U:
        raise InputError(
            f"{source} has {len(prompts)} prompts, sampling.B_U = {config.sampling.B_U} "
            "distinct ones are needed: lower B_U or give more prompts"
        )
    if config.rollouts.eval is None and len(prompts) < 2:
        raise InputError(
            f"{source} has {len(prompts)} prompts, but E needs two for a standard error: give more"
        )
    builtin, row = samples_update and config.reward.function in BUILT_IN, prompts[0].row
    if builtin and config.reward.answer_column not in row and ground_truth_of_verl(row) is None:
        there = {*row, config.prompts.prompt_column}
        reads = f'reward.function = "{config.reward.function}" reads reward.answer_column, but {source}'
        raise missing_column(config.reward.answer_column, there, reads)
    if samples_update and config.reward.conversational and prompts[0].messages is None:
        raise InputError(
            "reward.conversational = true needs prompts of messages: set prompts.chat = true as well"
        )
    shown = f"prompt 1 of {len(prompts)}, {_tokens(policy, found.ids[0])}"
    return found._replace(lines=[*found.lines, shown]), every


def response_line(policy: Policy, name: str, rollouts: Rollouts) -> str:
    """The first response of E or U, end-of-sequence token included."""
    ended = rollouts.finish_reason[0]
    return f"response 1 of {len(rollouts.response_ids)} of {name} ({ended}), " + _tokens(
        policy, rollouts.response_ids[0]
    )


def _tokens(policy: Policy, ids: Sequence[int]) -> str:
    return f"{len(ids)} tokens: {excerpt(policy.tokenizer.decode(list(ids)))}"
