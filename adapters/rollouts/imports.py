"""Rollouts that trainers log as text, converted to columns of SCHEMA under assumptions, for U only.

Neither format contains token ids, end-of-sequence tokens, log-probabilities or the temperature, so
that every import states in a line what it assumed.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from types import MappingProxyType, UnionType
from typing import Any, NamedTuple

from funcprobe.types import InputError

from ..checkpoint.template import UNRENDERABLE, rendered
from ..strict_json import is_text
from .files import Columns
from .provenance import TITLES, Layout, TrainingRun, require_next_step

_MARKS: dict[Layout, tuple[str, ...]] = {
    # TRL 1.16, trl/trainer/grpo_trainer.py, `log`: these, a column per reward function, and the
    # arguments of log_extra.
    "trl": ("step", "prompt", "completion", "advantage"),
    # verl 0.9.1, verl/trainer/ppo/ray_trainer.py and v1/trainer_base.py, `_write_generations`: these,
    # gts, and the reward function's results other than the score (or uid).
    "verl": ("step", "input", "output", "score"),
}


class Guesses(NamedTuple):
    """Values that the file does not contain, from the policy and the configuration."""

    tokenizer: Any
    eos_ids: Sequence[int]
    temperature: float
    max_new_tokens: int
    # Ids of prompts.source by their text without special tokens; None if it is not set.
    prompts: Mapping[str, Sequence[int]] | None
    run: TrainingRun
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})


def layout_of(file: Columns) -> Layout | None:
    """The trainer that wrote the file, by its columns; None for a file in SCHEMA, or if unknown."""
    if "response_ids" in file.values:
        return None
    return next((layout for layout, marks in _MARKS.items() if set(marks) <= file.values.keys()), None)


def refused_as_e(file: Columns, layout: Layout) -> InputError:
    """The error for such a file as rollouts.eval."""
    return InputError(
        f"rollouts.eval = {file.path} is {TITLES[layout]}: text, without the sampled tokens and their "
        "end, of which E's importance weights are probability ratios; remove rollouts.eval, so that E "
        "is sampled, or record token ids (docs/rollouts.md)"
    )


def import_columns(
    file: Columns, layout: Layout, guesses: Guesses, *, advantages: bool
) -> tuple[Columns, list[str]]:
    """Columns of SCHEMA, and a line for each assumption.

    Responses are tokenised again, and the tokenizer's EOS is appended to those of less than
    max_new_tokens tokens; a response of that length counts as cut off. Groups, prompts and rewards
    depend on the layout (`_trl`, `_verl`). `advantages`: whether the column advantage is needed.
    Raises InputError where this is impossible: a step other than the next, several steps in a file,
    responses of more than max_new_tokens, conversations with more than text, groups of unequal size,
    rows to which no reward function applied.
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
    replaced = "an evaluation at that step would have added its rows; " if layout == "trl" else ""
    lossy = (
        f"warning: U is {TITLES[layout]} ({file.path}), which is text: it is tokenised again, EOS "
        f"({eos}) is appended to the {sum(ended)} of {count} responses shorter than "
        f"sampling.max_new_tokens = {guesses.max_new_tokens}, and its temperature is assumed to be "
        f"sampling.temperature = {guesses.temperature:g}; {replaced}v is close to the trainer's step, "
        "not equal"
    )
    return Columns(file.path, file.place, found), [lossy, *of_run, *lines]


def _trl(file: Columns, guesses: Guesses, advantages: bool) -> tuple[dict[str, Any], list[str]]:
    """Prompts as TRL tokenises them; groups are the runs of equal prompts, split to the shortest run.

    A run is longer if a prompt was drawn twice in succession. The reward is the sum of all columns of
    floats (the type of TRL's rewards), without None, which equals TRL's for weights of 1.
    """
    prompts, lines = file.values["prompt"], []
    found: dict[str, Any] = {
        "prompt_index": _even_groups(file, prompts),
        "prompt": [_prompt_text(file, i, x, guesses) for i, x in enumerate(prompts)],
        "prompt_ids": [_prompt_ids(file, i, x, guesses) for i, x in enumerate(prompts)],
        "response": [_completion(file, i, x) for i, x in enumerate(file.values["completion"])],
        "advantage": file.values["advantage"],
    }
    columns = {k: v for k, v in file.values.items() if k not in _MARKS["trl"]}
    parts = {name: values for name, values in columns.items() if _are(float, values)}
    others = [k for k, values in columns.items() if k not in parts and _are(int | float, values)]
    rows = list(zip(*parts.values(), strict=True)) if parts else [()] * len(file.place)
    rewards = [_sum(row) for row in rows]
    # With advantages no rewards are needed, and a sum that includes log_extra is not a reward.
    found["reward"] = rewards if len(parts) == 1 or not advantages else [None] * len(rows)
    left_out = f"; excluded, as TRL's rewards are floats: {', '.join(others)}" if others else ""
    if None in rewards and not advantages:
        raise InputError(
            f"{file.path}: {file.place[rewards.index(None)]} has no reward (reward columns: "
            f'{", ".join(parts) or "none"}{left_out}): set objective.advantage = "rollouts" to use '
            "TRL's column advantage, which excludes such rows"
        )
    if (len(parts) > 1 or others) and not advantages:
        lines.append(
            f"warning: U's reward is the sum of {', '.join(parts)}, correct if all are rewards (not "
            f"log_extra) and all weights are 1{left_out}; otherwise set objective.advantage = "
            '"rollouts"'
        )
    return found, lines


def _verl(file: Columns, guesses: Guesses, advantages: bool) -> tuple[dict[str, Any], list[str]]:
    """Prompts looked up in the known ones, else tokenised again; groups by uid, else by equal prompts.

    verl reorders its batch, so that a group's rows need not be adjacent.
    """
    if advantages:
        raise InputError(
            f"{file.path} is {TITLES['verl']}, which contains no advantages: set objective.advantage "
            "to the mode with which verl computed them from the score"
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
        f"warning: {lost} of U's {len(inputs)} prompts {why} and were tokenised from text without "
        "special tokens (of a chat template, for instance): set prompts.source and prompts.chat as in "
        "training, else the prompts differ from those of training"
    ]


def _require_longest(file: Columns, ids: Sequence[Sequence[int]], most: int) -> None:
    for place, y in zip(file.place, ids, strict=True):
        if len(y) > most:
            raise InputError(
                f"{file.path}: {place} has a response of {len(y)} tokens, sampling.max_new_tokens = "
                f"{most}: set it to the run's maximum (if it is, the text does not reproduce the "
                "tokens: record token ids, docs/rollouts.md)"
            )


def _even_groups(file: Columns, prompts: Sequence[Any]) -> list[int]:
    runs = [len(list(run)) for _, run in groupby(prompts)]
    size = min(runs)
    if any(run % size for run in runs) or size == 1:
        raise InputError(
            f"{file.path}: equal prompts occur in runs of {size} to {max(runs)} rows, groups of equal "
            "size, at least 2, are expected: give the file as TRL wrote it, with its order of rows"
        )
    return [i // size for i in range(len(prompts))]


def _prompt_text(file: Columns, i: int, prompt: Any, guesses: Guesses) -> str:
    if not isinstance(prompt, list):
        return _text(file, i, "prompt", prompt)
    if not guesses.tokenizer.chat_template:
        raise InputError(
            f"{file.path}: {file.place[i]} has a prompt of messages, but the tokenizer has no chat "
            "template: use the tokenizer of the training run"
        )
    for message in prompt:
        _content(file, i, message)
    return str(_applied(file, i, prompt, guesses, tokenize=False))


def _prompt_ids(file: Columns, i: int, prompt: Any, guesses: Guesses) -> list[int]:
    """As TRL 1.16 does (`_tokenize_prompts`)."""
    if isinstance(prompt, str):
        return list(guesses.tokenizer(prompt)["input_ids"])
    return list(_applied(file, i, prompt, guesses, tokenize=True, return_dict=True)["input_ids"])


def _applied(file: Columns, i: int, prompt: Any, guesses: Guesses, **how: bool) -> Any:
    given = {"add_generation_prompt": True, **guesses.chat_template_kwargs}
    try:
        return rendered(guesses.tokenizer, prompt, **how, **given)
    except UNRENDERABLE as error:
        raise InputError(
            f"{file.path}: the chat template rejects the prompt of {file.place[i]}, or "
            f"prompts.chat_template_kwargs: {' '.join(str(error).split())}"
        ) from error


def _completion(file: Columns, i: int, completion: Any) -> str:
    if not isinstance(completion, list):
        return _text(file, i, "completion", completion)
    if len(completion) != 1:
        raise InputError(
            f"{file.path}: {file.place[i]} has a completion of {len(completion)} messages (tools?), "
            "one is expected: record token ids (docs/rollouts.md)"
        )
    return _content(file, i, completion[0])


def _content(file: Columns, i: int, message: Any) -> str:
    """A message's text; Parquet adds the keys of other rows with None."""
    filled = {k for k, v in message.items() if v is not None} if isinstance(message, dict) else set()
    if filled != {"role", "content"} or not all(is_text(message[k]) for k in filled):
        raise InputError(
            f"{file.path}: {file.place[i]} has a message with {', '.join(sorted(filled)) or 'no key'}; "
            "Unicode text as role and as content is expected: record token ids (docs/rollouts.md)"
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
            "of several outputs cannot be imported; record token ids (docs/rollouts.md)"
        )
    return match[1]


def _are(kind: type | UnionType, values: Sequence[Any]) -> bool:
    """Whether all are of a type or None, and not all None. A bool is an int."""
    return all(x is None or isinstance(x, kind) for x in values) and any(x is not None for x in values)


def _sum(row: Sequence[float | None]) -> float | None:
    known = [x for x in row if x is not None and not math.isnan(x)]
    try:
        return math.fsum(known) if known else None
    except (OverflowError, ValueError):  # beyond a double, or of both infinities
        return math.inf  # which is refused where it is a reward
