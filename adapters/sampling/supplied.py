"""E and U brought from elsewhere: files in SCHEMA, and, for U, what trainers log."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import Config
from ..rollouts import Rollouts, parse_rollouts
from ..rollouts.files import Columns, read_columns
from ..rollouts.imports import Guesses, import_columns, layout_of, refused_as_e
from ..rollouts.provenance import Layout, TrainingRun
from .advantages import Mode, require_gradient, require_prompts, update_advantages


class UpdateFile(NamedTuple):
    """rollouts.update as it was read; `layout` says whose log it is, None of one in SCHEMA."""

    columns: Columns
    layout: Layout | None


def bring_eval(config: Config, policy: Policy, vocabulary: int) -> Rollouts | None:
    """E, where rollouts.eval names it. InputError for a file without token ids, or of one prompt."""
    if config.rollouts.eval is None:
        return None
    file = read_columns(Path(config.rollouts.eval).expanduser())
    if layout := layout_of(file):
        raise refused_as_e(file, layout)
    found = parse_rollouts(file, vocabulary, rewards=False, eos_ids=policy.eos_ids)
    require_prompts("E", found.prompt_index, brought=True)
    return found


def fresh_length(config: Config, brought: Rollouts | None) -> int:
    """Where fresh responses to E's prompts are cut off: where those of a brought E were, if any was.

    Where all of them ended by themselves their own bound is not known, and is at least their longest.
    """
    if brought is None:
        return config.sampling.max_new_tokens
    longest = max(len(ids) for ids in brought.response_ids)
    if set(brought.finish_reason) == {"stop"}:
        return max(longest, config.sampling.max_new_tokens)
    return longest


def open_update(config: Config) -> UpdateFile | None:
    """U's file, where rollouts.update names it."""
    if config.rollouts.update is None:
        return None
    columns = read_columns(Path(config.rollouts.update).expanduser())
    return UpdateFile(columns, layout_of(columns))


def bring_update(
    file: UpdateFile | None,
    config: Config,
    policy: Policy,
    vocabulary: int,
    *,
    mode: Mode,
    prompt_ids: Sequence[Sequence[int]] | None,
    run: TrainingRun,
) -> tuple[Rollouts | None, list[str]]:
    """U, where there is a file, and a line for each thing that had to be guessed.

    `prompt_ids` are those of prompts.source, among which the prompts of verl's log are looked for;
    None where it is not set. InputError also for a U of one prompt or of no gradient (`mode` says
    where its advantages are from), and for a log of another step than that after the checkpoint.
    """
    if file is None:
        return None, []
    advantages, columns = mode == "rollouts", file.columns
    lines: list[str] = []
    if file.layout:
        decode = policy.tokenizer.decode
        known = (
            None if prompt_ids is None else {decode(x, skip_special_tokens=True): x for x in prompt_ids}
        )
        guesses = Guesses(
            tokenizer=policy.tokenizer,
            eos_ids=policy.eos_ids,
            temperature=config.sampling.temperature,
            max_new_tokens=config.sampling.max_new_tokens,
            prompts=known,
            run=run,
        )
        columns, lines = import_columns(columns, file.layout, guesses, advantages=advantages)
    found = parse_rollouts(
        columns, vocabulary, rewards=not advantages, advantages=advantages, eos_ids=policy.eos_ids
    )
    require_prompts("U", found.prompt_index, brought=True)
    require_gradient(update_advantages(found, mode)[0], found.prompt_index, mode, brought=True)
    return found, lines


def common_temperature(
    config: Config, brought_eval: Rollouts | None, brought_update: Rollouts | None
) -> float:
    """That of E and of U, which must be samples of one policy; InputError if they are not.

    Equal to 1e-6 is equal: 0.7 in a column of float32 is 0.699999988.
    """
    of_eval, of_update = (
        brought.temperature if brought else config.sampling.temperature
        for brought in (brought_eval, brought_update)
    )
    if not math.isclose(of_eval, of_update, rel_tol=1e-6):
        raise InputError(
            f"E has temperature {of_eval:.9g} and U {of_update:.9g}, both must be samples of one "
            "policy: set sampling.temperature to that of the rollouts that are brought, or bring others"
        )
    return of_eval
