"""E and U brought from elsewhere: files in SCHEMA, and, for U, what trainers log."""

from collections.abc import Sequence
from pathlib import Path

from funcprobe.types import InputError

from .config import Config
from .model import Policy
from .rollout_files import read_columns
from .rollout_imports import Guesses, import_columns, layout_of, refused_as_e
from .rollouts import Rollouts, parse_rollouts


def bring_eval(config: Config, policy: Policy, vocabulary: int) -> Rollouts | None:
    """E, where rollouts.eval names it. InputError for a file that holds no token ids."""
    if config.rollouts.eval is None:
        return None
    file = read_columns(Path(config.rollouts.eval).expanduser())
    if layout := layout_of(file):
        raise refused_as_e(file, layout)
    return parse_rollouts(file, vocabulary, rewards=False, eos_ids=policy.eos_ids)


def bring_update(
    config: Config, policy: Policy, vocabulary: int, prompt_ids: Sequence[Sequence[int]]
) -> tuple[Rollouts | None, list[str]]:
    """U, where rollouts.update names it, and a line for each thing that had to be guessed.

    `prompt_ids` are those of prompts.source, among which the prompts of a lossy file are looked for.
    """
    if config.rollouts.update is None:
        return None, []
    file = read_columns(Path(config.rollouts.update).expanduser())
    advantages = config.objective.advantage == "rollouts"
    lines: list[str] = []
    if layout := layout_of(file):
        decode = policy.tokenizer.decode
        guesses = Guesses(
            tokenizer=policy.tokenizer,
            eos_ids=policy.eos_ids,
            temperature=config.sampling.temperature,
            max_new_tokens=config.sampling.max_new_tokens,
            prompts={decode(ids, skip_special_tokens=True): ids for ids in prompt_ids},
        )
        file, lines = import_columns(file, layout, guesses, advantages=advantages)
    found = parse_rollouts(
        file, vocabulary, rewards=not advantages, advantages=advantages, eos_ids=policy.eos_ids
    )
    return found, lines


def common_temperature(
    config: Config, brought_eval: Rollouts | None, brought_update: Rollouts | None
) -> float:
    """That of E and of U, which must be samples of one policy; InputError if they are not."""
    of_eval, of_update = (
        brought.temperature if brought else config.sampling.temperature
        for brought in (brought_eval, brought_update)
    )
    if of_eval != of_update:
        raise InputError(
            f"E has temperature {of_eval:g} and U {of_update:g}, both must be samples of one policy: "
            "set sampling.temperature to that of the rollouts that are brought, or bring others"
        )
    return of_eval
