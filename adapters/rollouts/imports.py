"""Rollouts as trainers log them, which is as text: made into columns of SCHEMA by guessing, for U only.

Neither file holds token ids, end-of-sequence tokens, log-probabilities or the temperature, so that
every import says in a line what it took them to be.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from types import UnionType
from typing import Any, NamedTuple

from funcprobe.types import InputError

from .files import Columns, is_text
from .provenance import TITLES, Layout, TrainingRun, require_next_step

_MARKS: dict[Layout, tuple[str, ...]] = {
    # TRL 1.16, trl/trainer/grpo_trainer.py, `log`: these, a column per reward function, and what
    # log_extra was given.
    "trl": ("step", "prompt", "completion", "advantage"),
    # verl 0.9.1, verl/trainer/ppo/ray_trainer.py and v1/trainer_base.py, `_write_generations`: these,
    # gts, and what the reward function returned beside its score (or uid).
    "verl": ("step", "input", "output", "score"),
}


class Guesses(NamedTuple):
    """What the file does not say, from the policy and the configuration."""

    tokenizer: Any
    eos_ids: Sequence[int]
    temperature: float
    max_new_tokens: int
    # Ids of prompts.source by their text without special tokens; None where it is not set.
    prompts: Mapping[str, Sequence[int]] | None
    run: TrainingRun


def layout_of(file: Columns) -> Layout | None:
    """Whose file it is, by its columns; None for one in SCHEMA, or of nobody known."""
    if "response_ids" in file.values:
        return None
    return next((layout for layout, marks in _MARKS.items() if set(marks) <= file.values.keys()), None)


def refused_as_e(file: Columns, layout: Layout) -> InputError:
    """Why E cannot be made of it."""
    return InputError(
        f"rollouts.eval = {file.path} is {TITLES[layout]}: text, without the tokens that were sampled "
        "and where they ended, while E's importance weights are ratios of exactly these; leave "
        "rollouts.eval out, so that E is sampled, or record token ids (README, Rollouts)"
    )


def import_columns(
    file: Columns, layout: Layout, guesses: Guesses, *, advantages: bool
) -> tuple[Columns, list[str]]:
    """Columns of SCHEMA, and a line for each thing that was guessed.

    Responses are tokenised again, with the tokenizer's EOS behind those of less than max_new_tokens
    tokens: a response that long counts as cut off. Groups, prompts and rewards are the layout's
    (`_trl`, `_verl`). `advantages` says that the column advantage is wanted.
    Raises InputError for what that cannot be done with: another step than the checkpoint's next,
    several steps in a file, responses of more than max_new_tokens, conversations with more than text,
    groups that do not come out even, rows that no reward function applied to.
    """
    if not file.place:
        raise InputError(f"{file.path} has no rows: at least two prompts are needed")
    of_run = require_next_step(file, layout, guesses.run)
    found, lines = (_trl if layout == "trl" else _verl)(file, guesses, advantages)
    tokenizer, eos_ids = guesses.tokenizer, guesses.eos_ids
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in eos_ids else eos_ids[0]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in found["response"]]
    _require_longest(file, ids, guesses.max_new_tokens)
    ended = [len(y) < guesses.max_new_tokens for y in ids]
    count = len(ids)
    found |= {
        "response_ids": [[*y, eos] if end else y for y, end in zip(ids, ended, strict=True)],
        "temperature": [guesses.temperature] * count,
    }
    replaced = (
        "an evaluation at that step would have put its rows into the file; " if layout == "trl" else ""
    )
    lossy = (
        f"warning: U is {TITLES[layout]} ({file.path}), which is text: its tokens are guessed by "
        f"tokenising again, EOS ({eos}) is put behind the {sum(ended)} of {count} responses shorter "
        f"than sampling.max_new_tokens = {guesses.max_new_tokens}, and its temperature is taken to be "
        f"sampling.temperature = {guesses.temperature:g}; {replaced}v is near the trainer's step, not "
        "equal"
    )
    return Columns(file.path, file.place, found), [lossy, *of_run, *lines]


def _trl(file: Columns, guesses: Guesses, advantages: bool) -> tuple[dict[str, Any], list[str]]:
    """Prompts as TRL tokenises them; groups are the runs of equal prompts, cut to the shortest run.

    A run is longer where one prompt was drawn twice in a row. The reward is the sum of all columns of
    floats, as TRL's rewards are, None left out, which is TRL's own for weights of 1.
    """
    prompts, lines = file.values["prompt"], []
    found: dict[str, Any] = {
        "prompt_index": _even_groups(file, prompts),
        "prompt": [_prompt_text(file, i, x, guesses.tokenizer) for i, x in enumerate(prompts)],
        "prompt_ids": [_prompt_ids(x, guesses.tokenizer) for x in prompts],
        "response": [_completion(file, i, x) for i, x in enumerate(file.values["completion"])],
        "advantage": file.values["advantage"],
    }
    columns = {k: v for k, v in file.values.items() if k not in _MARKS["trl"]}
    parts = {name: values for name, values in columns.items() if _are(float, values)}
    others = [k for k, values in columns.items() if k not in parts and _are(int | float, values)]
    rows = list(zip(*parts.values(), strict=True)) if parts else [()] * len(file.place)
    rewards = [_sum(row) for row in rows]
    # Advantages need no rewards, and a sum over log_extra is none.
    found["reward"] = rewards if len(parts) == 1 or not advantages else [None] * len(rows)
    left_out = f"; left out, as TRL's rewards are floats: {', '.join(others)}" if others else ""
    if None in rewards and not advantages:
        raise InputError(
            f"{file.path}: {file.place[rewards.index(None)]} has no reward (reward columns: "
            f'{", ".join(parts) or "none"}{left_out}): set objective.advantage = "rollouts" to take '
            "TRL's column advantage, which leaves such rows out"
        )
    if (len(parts) > 1 or others) and not advantages:
        lines.append(
            f"warning: U's reward is the sum of {', '.join(parts)}, right if all are rewards (not "
            f"log_extra) and all weights are 1{left_out}; if that is wrong, set objective.advantage = "
            '"rollouts"'
        )
    return found, lines


def _verl(file: Columns, guesses: Guesses, advantages: bool) -> tuple[dict[str, Any], list[str]]:
    """Prompts found among the known ones, else tokenised again; groups by uid, else by equal prompts.

    verl reorders its batch, so that a group's rows need not be neighbours.
    """
    if advantages:
        raise InputError(
            f"{file.path} is {TITLES['verl']}, which holds no advantages: set objective.advantage "
            "to how verl made them of the score"
        )
    inputs = [_text(file, i, "input", x) for i, x in enumerate(file.values["input"])]
    keys = [
        _uid(file, i, uid) if uid is not None else text
        for i, (uid, text) in enumerate(
            zip(file.values.get("uid", [None] * len(inputs)), inputs, strict=True)
        )
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    tokenizer, known = guesses.tokenizer, guesses.prompts or {}
    found = {
        "prompt_index": [numbers[key] for key in keys],
        "prompt": inputs,
        "prompt_ids": [list(known[x]) if x in known else tokenizer(x)["input_ids"] for x in inputs],
        "response": [_text(file, i, "output", x) for i, x in enumerate(file.values["output"])],
        "reward": file.values["score"],
    }
    lost = sum(text not in known for text in inputs)
    if not lost:
        return found, []
    why = "are not in prompts.source" if guesses.prompts is not None else "(prompts.source is not set)"
    return found, [
        f"warning: {lost} of U's {len(inputs)} prompts {why} and were tokenised from text that lacks "
        "special tokens (the marks of a chat template): set prompts.source and prompts.chat as in "
        "training, or the policy sees other prompts"
    ]


def _require_longest(file: Columns, ids: Sequence[Sequence[int]], most: int) -> None:
    for place, y in zip(file.place, ids, strict=True):
        if len(y) > most:
            raise InputError(
                f"{file.path}: {place} has a response of {len(y)} tokens, sampling.max_new_tokens = "
                f"{most}: set it to the run's longest (if it is that, text does not give its tokens "
                "back: record token ids, README, Rollouts)"
            )


def _even_groups(file: Columns, prompts: Sequence[Any]) -> list[int]:
    runs = [len(list(run)) for _, run in groupby(prompts)]
    size = min(runs)
    if any(run % size for run in runs) or size == 1:
        raise InputError(
            f"{file.path}: equal prompts stand in runs of {size} to {max(runs)} rows, groups of one "
            "size, at least 2, are expected: give the file as TRL wrote it, rows in its order"
        )
    return [i // size for i in range(len(prompts))]


def _prompt_text(file: Columns, i: int, prompt: Any, tokenizer: Any) -> str:
    if not isinstance(prompt, list):
        return _text(file, i, "prompt", prompt)
    if not tokenizer.chat_template:
        raise InputError(
            f"{file.path}: {file.place[i]} has a prompt of messages, and the tokenizer has no chat "
            "template: give the tokenizer the run was trained with"
        )
    for message in prompt:
        _content(file, i, message)
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


def _prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """As TRL 1.16 does (`_tokenize_prompts`)."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    rendered = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(rendered["input_ids"])


def _completion(file: Columns, i: int, completion: Any) -> str:
    if not isinstance(completion, list):
        return _text(file, i, "completion", completion)
    if len(completion) != 1:
        raise InputError(
            f"{file.path}: {file.place[i]} has a completion of {len(completion)} messages (tools?), "
            "one is expected: record token ids (README, Rollouts)"
        )
    return _content(file, i, completion[0])


def _content(file: Columns, i: int, message: Any) -> str:
    """A message's text; Parquet fills the keys that other rows have with None."""
    filled = {k for k, v in message.items() if v is not None} if isinstance(message, dict) else set()
    if filled != {"role", "content"} or not all(is_text(message[k]) for k in filled):
        raise InputError(
            f"{file.path}: {file.place[i]} has a message with {', '.join(sorted(filled)) or 'no key'}; "
            "Unicode text as role and as content is expected: record token ids (README, Rollouts)"
        )
    return str(message["content"])


def _text(file: Columns, i: int, name: str, value: Any) -> str:
    if not is_text(value):
        raise InputError(
            f"{file.path}: {file.place[i]} has {value!r:.60} in {name}, Unicode text is expected"
        )
    return str(value)


def _uid(file: Columns, i: int, uid: Any) -> str:
    """The prompt's part of verl's {uid}_{session}_{output}."""
    match = re.fullmatch(r"(.+)_\d+_(\d+)", uid) if isinstance(uid, str) else None
    if match is None or match[2] != "0":
        raise InputError(
            f"{file.path}: {file.place[i]} has uid {uid!r:.60}, PROMPT_SESSION_0 is expected: sessions "
            "of several outputs cannot be imported; record token ids (README, Rollouts)"
        )
    return match[1]


def _are(kind: type | UnionType, values: Sequence[Any]) -> bool:
    """All of a kind or None, and not all None. A bool is an int."""
    return all(x is None or isinstance(x, kind) for x in values) and any(x is not None for x in values)


def _sum(row: Sequence[float | None]) -> float | None:
    known = [x for x in row if x is not None and not math.isnan(x)]
    return math.fsum(known) if known else None
