"""E and U supplied as files: in SCHEMA or, for U, as logged by trainers."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from funcprobe.types import InputError, Rule

from ..checkpoint.model import Policy
from ..config.schema import Config
from ..machine.home import expanded
from ..rollouts import Rollouts, parse_rollouts
from ..rollouts.files import Columns, read_columns, require_all_ranks
from ..rollouts.imports import Guesses, import_columns, layout_of, refused_as_e
from ..rollouts.provenance import Layout, TrainingRun
from .advantages import Mode, require_prompts, require_step, update_advantages


class UpdateFile(NamedTuple):
    """rollouts.update as read; `layout` is the trainer whose log it is, None for a file in SCHEMA."""

    columns: Columns
    layout: Layout | None


def load_supplied_eval(config: Config, policy: Policy, vocabulary: int) -> Rollouts | None:
    """E, if rollouts.eval is set. InputError for a file without token ids, or with a single prompt."""
    if config.rollouts.eval is None:
        return None
    file = read_columns(expanded(config.rollouts.eval), "schema")
    if layout := layout_of(file):
        raise refused_as_e(file, layout)
    found = parse_rollouts(file, vocabulary, rewards=False, eos_ids=policy.eos_ids)
    require_prompts("E", found.prompt_index, supplied=True)
    return found


def fresh_length(config: Config, supplied: Rollouts | None) -> int:
    """Length at which resampled responses to E's prompts are cut off: as in a supplied E, if any.

    If all of its responses ended with an EOS, their limit is unknown, but at least the longest of them.
    """
    if supplied is None:
        return config.sampling.max_new_tokens
    longest = max(len(ids) for ids in supplied.response_ids)
    if set(supplied.finish_reason) == {"stop"}:
        return max(longest, config.sampling.max_new_tokens)
    return longest


def open_update(config: Config) -> UpdateFile | None:
    """U's file, if rollouts.update is set."""
    if config.rollouts.update is None:
        return None
    path = expanded(config.rollouts.update)
    require_all_ranks(path)
    columns = read_columns(path, "schema")
    return UpdateFile(columns, layout_of(columns))


def load_supplied_update(
    file: UpdateFile | None,
    config: Config,
    policy: Policy,
    vocabulary: int,
    *,
    mode: Mode,
    rule: Rule,
    prompt_ids: Iterable[Sequence[Sequence[int]]] | None,
    run: TrainingRun,
    loss: bool = False,
) -> tuple[Rollouts | None, list[str]]:
    """U, if there is a file, and a line for each assumption that was needed.

    `prompt_ids` are those of prompts.source, some at once, in which the prompts of verl's log are
    looked up; None if it is not set. `mode` states where U's advantages come from. InputError also for
    a U with a single prompt, for a log of another step than the next, and, unless `loss` (a loss may
    have a gradient where every advantage is 0), for one without gradient with another `rule` than
    "adamw".
    """
    if file is None:
        return None, []
    advantages, columns = mode == "rollouts", file.columns
    lines: list[str] = []
    if file.layout:
        known = None if prompt_ids is None else _by_text(columns, policy, prompt_ids)
        guesses = Guesses(
            tokenizer=policy.tokenizer,
            eos_ids=policy.eos_ids,
            temperature=config.sampling.temperature,
            max_new_tokens=config.sampling.max_new_tokens,
            prompts=known,
            run=run,
            chat_template_kwargs=config.prompts.chat_template_kwargs,
        )
        columns, lines = import_columns(columns, file.layout, guesses, advantages=advantages)
    found = parse_rollouts(
        columns, vocabulary, rewards=not advantages, advantages=advantages, eos_ids=policy.eos_ids
    )
    require_prompts("U", found.prompt_index, supplied=True)
    advantage_N, _ = update_advantages(found, mode)
    if not loss:
        lines += require_step(advantage_N, found.prompt_index, mode, rule, supplied=True)
    return found, lines


def _by_text(
    columns: Columns, policy: Policy, prompt_ids: Iterable[Sequence[Sequence[int]]]
) -> dict[str, Sequence[int]]:
    """The prompts that the log has, by their text without special tokens."""
    logged = {x for x in columns.values.get("input", []) if isinstance(x, str)}
    found: dict[str, Sequence[int]] = {}
    for some in prompt_ids:
        for ids in some:
            if (text := policy.tokenizer.decode(ids, skip_special_tokens=True)) in logged:
                found[text] = ids
    return found


def common_temperature(
    config: Config, supplied_eval: Rollouts | None, supplied_update: Rollouts | None
) -> float:
    """The temperature of E and of U, which must be equal; InputError if it is not.

    Compared with relative tolerance 1e-6: 0.7 in a column of float32 is 0.699999988.
    """
    of_eval, of_update = (
        supplied.temperature if supplied else config.sampling.temperature
        for supplied in (supplied_eval, supplied_update)
    )
    if not math.isclose(of_eval, of_update, rel_tol=1e-6):
        raise InputError(
            f"E has temperature {of_eval:.9g} and U {of_update:.9g}, both must be sampled from one "
            "policy: set sampling.temperature to that of the supplied rollouts, or supply others"
        )
    return of_eval
