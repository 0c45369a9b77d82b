"""The prompts of a run: loaded, rendered, encoded, shown."""

from collections.abc import Sequence
from typing import NamedTuple

from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..checkpoint.vocabulary import require_rows
from ..config.schema import Config
from ..console import excerpt
from ..rollouts import Rollouts
from ..sampling.answers import ground_truth_of_verl
from ..sampling.encoding import encode_prompts
from ..sampling.prompts import Prompt, load_prompts, missing_column, render_prompts
from ..sampling.rewards import BUILT_IN
from ..sampling.sources import Row


class Prompts(NamedTuple):
    """Prompts, their token ids, and lines for the log."""

    prompts: list[Prompt]
    ids: list[list[int]]
    lines: list[str]


def no_prompts() -> Prompts:
    """For batches that are supplied."""
    return Prompts([], [], [])


def encoded(config: Config, policy: Policy, rows: Sequence[Row] | None = None) -> Prompts:
    """Of `rows`, by default those of prompts.source. InputError if they cannot be used."""
    chosen = config.prompts
    examples = load_prompts(
        chosen.source if rows is None else rows,
        prompt_column=chosen.prompt_column,
        split=chosen.split,
        template=chosen.template,
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
    return Prompts(prompts, ids, [*made, *special])


def sampled_from(config: Config, policy: Policy) -> Prompts:
    """The prompts from which E and U are drawn, and the first of them in a line.

    InputError also for too few of them, and for prompts that do not suit the reward.
    """
    found, source = encoded(config, policy), config.prompts.source
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
    return found._replace(lines=[*found.lines, shown])


def response_line(policy: Policy, name: str, rollouts: Rollouts) -> str:
    """The first response of E or U, end-of-sequence token included."""
    ended = rollouts.finish_reason[0]
    return f"response 1 of {len(rollouts.response_ids)} of {name} ({ended}), " + _tokens(
        policy, rollouts.response_ids[0]
    )


def _tokens(policy: Policy, ids: Sequence[int]) -> str:
    return f"{len(ids)} tokens: {excerpt(policy.tokenizer.decode(list(ids)))}"
