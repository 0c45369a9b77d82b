"""`funcprobe init --from`: a configuration for a checkpoint and its prompts, every choice explained."""

import json
import math
import re
import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit

from funcprobe.step.objective import PRESETS
from funcprobe.types import InputError

from .checkpoint.trainer_state import FILE as TRAINER_STATE
from .config.paths import resolve
from .config.schema import Config
from .console import excerpt
from .inspection import inspect
from .optimizer import Sidecar, find_sidecar
from .sampling.answers import ground_truth_of_verl
from .sampling.prompts import load_prompts
from .sampling.rewards import load_reward
from .sampling.sources import Row, read_rows
from .stages.differences import ADVANTAGES
from .stages.step import DEFAULT_MAX_GRAD_NORM

PROMPT_COLUMNS = ("prompt", "question", "problem", "query", "instruction", "input", "text")
ANSWER_COLUMNS = ("answer", "ground_truth", "solution", "target", "label", "final_answer")
AROUND = (0.1, 0.3, 3.0, 10.0)  # etas, in units of the next learning rate
TRIED = 100  # references that "math" has to read, which takes milliseconds for each
TEMPLATE_TOKENS = 512  # more than chat templates write around a prompt


class Choice(NamedTuple):
    """A key of the configuration, its value, and the comment above it."""

    key: str
    value: Any
    why: str


def propose(
    checkpoint: Path,
    prompts: str,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    reward: str | None = None,
) -> str:
    """The text of a configuration that runs as it is, from any folder.

    Settings of the run are read from the sidecar and the trainer's state, where there are; the others
    are the defaults of trainers. Raises InputError, one line, if the optimizer's state or the prompts
    cannot be read, and if no reward is given and none of the built-in ones reads the answers.
    """
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} is not a folder: give a trainer's checkpoint folder")
    document = inspect(checkpoint)
    sidecar = find_sidecar(Path(document["path"]))
    rows = read_rows(prompts, split)
    of_prompts = _prompts(rows, prompts, split, prompt_column)
    sampling = _sampling(checkpoint, sidecar, rows)
    longest = {c.key: c.value for c in sampling}["sampling.max_new_tokens"]
    choices = [
        *_run(checkpoint, document, rows, of_prompts[0].value, longest),
        *of_prompts,
        *_reward(rows, reward),
        *sampling,
        *_objective(sidecar),
        *_optimizer(document, sidecar),
        *_measure(document),
    ]
    missing = [f"not found: {line}" for line in document["missing"]]
    return _text(choices, [f"A probe of {checkpoint.absolute()}.", *missing])


def _run(
    checkpoint: Path, document: dict[str, Any], rows: Sequence[Row], prompt: str, longest: int
) -> list[Choice]:
    chosen = [Choice("policy.checkpoint", str(checkpoint), "adapter, optimizer state and tokenizer")]
    base = (document["names"] or {}).get("base")
    if base and not Path(base).is_absolute() and Path(base).exists():
        chosen.append(Choice("policy.base", base, "as saved with the adapter, relative to this folder"))
    # A token has at least a byte.
    most = max(len(json.dumps(row.get(prompt), default=str).encode()) for row in rows)
    needed = most + TEMPLATE_TOKENS + longest
    default = Config().run.max_tokens
    if default != "auto" and needed > default:
        size = 1024 * math.ceil(needed / 1024)
        chosen.append(Choice("run.max_tokens", size, "the longest prompt and response must fit"))
    return chosen


def _prompts(rows: Sequence[Row], source: str, split: str, column: str | None) -> list[Choice]:
    if len(rows) < 2:
        raise InputError(f"{source} has {len(rows)} rows, at least two prompts are needed: give more")
    there = rows[0].keys()
    found = column or next((name for name in PROMPT_COLUMNS if name in there), None)
    if found is None:
        raise InputError(
            f"{source} has none of the columns {', '.join(PROMPT_COLUMNS)}; its columns are "
            f"{', '.join(sorted(there))}: give the one with the prompts by --prompt-column"
        )
    examples = load_prompts(rows, prompt_column=found)
    kind = "messages" if isinstance(examples[0].given, list) else "text"
    how = (
        "messages, rendered by the tokenizer's chat template: what the run passed to it (as "
        "enable_thinking) goes into chat_template_kwargs"
        if kind == "messages"
        else "text, a user message if the tokenizer has a chat template: chat = false if it was not so"
    )
    chosen = [
        Choice("prompts.prompt_column", found, how),
        Choice("prompts.source", source, f"{len(rows)} prompts"),
    ]
    if split != "train":
        chosen.append(Choice("prompts.split", split, "of the data set"))
    return chosen


def _reward(rows: Sequence[Row], given: str | None) -> list[Choice]:
    if given is not None:
        load_reward(given)
        return [Choice("reward.function", given, "as given")]
    of_verl = isinstance(rows[0].get("reward_model"), dict)
    column = next((name for name in ANSWER_COLUMNS if name in rows[0]), None)
    remedy = "give the run's reward by --reward module.py:function"
    if column is None and not of_verl:
        raise InputError(
            f"no column of answers ({', '.join(ANSWER_COLUMNS)}, or verl's reward_model) among "
            f"{', '.join(sorted(rows[0]))}: {remedy}"
        )
    where = "reward_model" if of_verl else f"column {column}"
    answers = column or "answer"
    likely = ("numeric", "math") if _look_like_math(answers, rows) else ("numeric",)
    name = next((name for name in likely if _reads(name, answers, rows)), None)
    if name is None:
        shown = excerpt(str(rows[0]["reward_model" if of_verl else answers]), beginning=40, end=10)
        raise InputError(f"the answers in {where}, as {shown}, are neither numbers nor math: {remedy}")
    what = "numbers" if name == "numeric" else "not all numbers, but math-verify reads them"
    chosen = [
        Choice(
            "reward.function",
            name,
            f"the answers ({where}) are {what}; if the run had another reward, set it, as "
            '"path/to/rewards.py:function": else the step is another one',
        )
    ]
    if column is not None:
        chosen.append(Choice("reward.answer_column", column, "the reference answers"))
    return chosen


def _reads(name: str, column: str, rows: Sequence[Row]) -> bool:
    """Whether a built-in reward accepts the answers as references."""
    few = list(rows[:TRIED])
    try:
        load_reward(name, answer_column=column)(
            [""] * len(few), ["0"] * len(few), [[0]] * len(few), few
        )
    except InputError:
        return False
    return True


def _look_like_math(column: str, rows: Sequence[Row]) -> bool:
    """Whether nine in ten are boxed, or have no words: math-verify reads sentences too, as products."""
    found = [str(ground_truth_of_verl(row) or row.get(column)) for row in rows]
    wordy = [a for a in found if re.search(r"[^\W\d_]{4}", re.sub(r"\\[a-zA-Z]+(\{[^{}]*\})?", "", a))]
    return sum("\\boxed" not in answer for answer in wordy) <= len(found) / 10


def _sampling(checkpoint: Path, sidecar: Sidecar | None, rows: Sequence[Row]) -> list[Choice]:
    ran = sidecar.sampling if sidecar else {}
    default = Config().sampling
    chosen = [Choice("sampling.B_E", default.B_E, "the standard error falls as 1/sqrt(B_E)")]
    chosen += [
        _of_run(f"sampling.{key}", ran.get(name), name, getattr(default, key))
        for key, name in (
            ("G", "num_generations"),
            ("max_new_tokens", "max_completion_length"),
            ("temperature", "temperature"),
        )
    ]
    group = chosen[1].value
    sequences, source = _sequences(checkpoint, sidecar)
    size = default.B_U if sequences is None else max(2, sequences // group)
    why = f"{source}; B_U x G should be the sequences of one optimizer step"
    if size > len(rows):
        size, why = len(rows), f"{why}, but there are {len(rows)} prompts"
    chosen.append(Choice("sampling.B_U", size, why))
    if arguments := ran.get("chat_template_kwargs"):
        chosen.append(Choice("prompts.chat_template_kwargs", arguments, "of the run (sidecar)"))
    return chosen


def _sequences(checkpoint: Path, sidecar: Sidecar | None) -> tuple[int | None, str]:
    """Sequences of one optimizer step, and where they are from; None if unknown."""
    loss = sidecar.loss if sidecar else {}
    names = ("generation_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    sizes: list[Any] = [loss.get(name) for name in names]
    generated, accumulated, per_generation = sizes
    if all(type(x) is int and x > 0 for x in sizes):
        found: int = generated * accumulated // per_generation
        return found, f"the run's step had {found} sequences (sidecar)"
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        state = None
    size = state.get("train_batch_size") if isinstance(state, dict) else None
    if type(size) is int and size > 0:
        return size, f"train_batch_size is {size} ({TRAINER_STATE}), for one process and micro-batch"
    return None, "the run's batch is not recorded"


def _objective(sidecar: Sidecar | None) -> list[Choice]:
    loss = sidecar.loss if sidecar else {}
    kind, scale = loss.get("loss_type"), loss.get("scale_rewards")
    preset = "dapo" if kind == "bnpo" else kind
    if preset not in PRESETS:
        why = "not recorded; TRL's default" if kind is None else f"no preset has the run's loss {kind}"
        return [Choice("objective.preset", Config().objective.preset, f"{why}: set the run's")]
    chosen = [Choice("objective.preset", preset, f"the run's loss_type, {kind} (sidecar)")]
    advantage = ADVANTAGES.get(str(scale))
    if advantage and advantage != PRESETS[preset].advantage:
        chosen.append(Choice("objective.advantage", advantage, f"the run's scale_rewards, {scale}"))
    return chosen


def _optimizer(document: dict[str, Any], sidecar: Sidecar | None) -> list[Choice]:
    saved = sidecar.max_grad_norm if sidecar else None
    chosen = [_of_run("optimizer.max_grad_norm", saved, "max_grad_norm", DEFAULT_MAX_GRAD_NORM)]
    if (document["names"] or {}).get("verified_by_gradients"):
        chosen.append(
            Choice(
                "optimizer.accept_positional",
                True,
                "the state has no names: a run compares the trainer's order with the gradients on U, "
                "and trusts it, with a warning, if they leave it open (ParamNamesCallback saves names)",
            )
        )
    return chosen


def _measure(document: dict[str, Any]) -> list[Choice]:
    group: dict[str, Any] = next((g for g in document["groups"] if g["parameters"]), {})
    now, first = group.get("lr"), group.get("initial_lr")
    if isinstance(now, int | float) and now > 0:
        etas = [float(f"{factor * now:.1e}") for factor in AROUND]
        return [Choice("measure.etas", etas, f"around the next learning rate, {now:g}, which is added")]
    if isinstance(first, int | float) and first > 0:
        etas = [float(f"{factor * first:.1e}") for factor in sorted((*AROUND, 1.0))]
        why = f"around initial_lr, {first:g}: the next learning rate is 0, or not recorded"
        return [Choice("measure.etas", etas, why)]
    etas = list(Config().measure.etas)
    return [Choice("measure.etas", etas, "the defaults: the state records no learning rate")]


def _of_run(key: str, value: Any, name: str, default: Any) -> Choice:
    """A number of the sidecar, else a default."""
    if type(value) in (int, float):
        return Choice(key, value, f"the run's {name} (sidecar)")
    return Choice(key, default, f"the run's {name} is not recorded: set it, if it was not {default:g}")


def _text(choices: Sequence[Choice], head: Sequence[str]) -> str:
    tables: dict[str, Any] = {}
    for choice in choices:
        section, _, name = choice.key.partition(".")
        tables.setdefault(section, {})[name] = choice.value
    tables = resolve(tables, Path.cwd(), written_in="the proposal")
    Config.model_validate(tables)
    document = tomlkit.document()
    for line in chain.from_iterable(map(_lines, head)):
        document.add(tomlkit.comment(line))
    for section in (name for name in Config.model_fields if name in tables):
        table = tomlkit.table()
        for choice in choices:
            if choice.key.startswith(f"{section}."):
                name = choice.key.partition(".")[2]
                value = tables[section][name]
                for line in _lines(choice.why):
                    table.add(tomlkit.comment(line))
                table.add(name, tomlkit.item(value) if not isinstance(value, dict) else _inline(value))
        document.add(section, table)
    return tomlkit.dumps(document)


def _lines(comment: str) -> list[str]:
    return textwrap.wrap("".join(c if c.isprintable() else " " for c in comment), 100)


def _inline(table: dict[str, Any]) -> Any:
    found = tomlkit.inline_table()
    found.update({key: value for key, value in table.items() if value is not None})
    return found
