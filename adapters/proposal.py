"""`funcprobe init --from`: a configuration for a checkpoint and its prompts, every choice explained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from funcprobe.step.objective import PRESETS
from funcprobe.types import InputError

from . import strict_json
from .checkpoint.trainer_state import FILE as TRAINER_STATE
from .config.choices import Choice, as_toml, configuration
from .config.schema import Config
from .console import excerpt
from .inspection import inspect
from .optimizer import Sidecar, find_sidecar
from .optimizer.sidecar import FILE as SIDECAR
from .sampling.answers import ground_truth_of_verl
from .sampling.prompts import load_prompts
from .sampling.rewards import load_reward
from .sampling.sources import Row, read_rows
from .stages.differences import ADVANTAGES, loss_type
from .stages.run_settings import run_settings
from .stages.step import DEFAULT_MAX_GRAD_NORM

PROMPT_COLUMNS = ("prompt", "question", "problem", "query", "instruction", "input", "text")
ANSWER_COLUMNS = ("answer", "ground_truth", "solution", "target", "label", "final_answer")
AROUND = (0.1, 0.3, 3.0, 10.0)  # etas, in units of the next learning rate
TRIED = 100  # references that "math" has to read, which takes milliseconds for each


def propose(
    checkpoint: Path,
    prompts: str,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    reward: str | None = None,
) -> str:
    """The text of a configuration that runs as it is, from any folder.

    What the sidecar records is left unset, for a run takes it from there; the others are read from the
    trainer's state, or are defaults of trainers. Raises InputError, one line, if the optimizer's state
    or the prompts cannot be read, and if no reward is given and none of the built-in ones reads the
    answers.
    """
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} is not a folder: give a trainer's checkpoint folder")
    document = inspect(checkpoint)
    sidecar = find_sidecar(Path(document["path"]))
    rows = read_rows(prompts, split)
    of_prompts = _prompts(rows, prompts, split, prompt_column)
    settings = run_settings(configuration({"policy.checkpoint": str(checkpoint)}))
    recorded = {f"{s}.{key}": value for s in settings for key, value in settings[s].items()}
    sampling = _sampling(checkpoint, recorded, rows)
    choices = [
        *_run(checkpoint, document),
        *of_prompts,
        *_reward(rows, reward),
        *sampling,
        *_chat_template_kwargs(sidecar),
        *_objective(recorded, sidecar),
        *_optimizer(document, recorded),
        *_measure(document),
    ]
    missing = [f"not found: {line}" for line in document["missing"]]
    head = [f"A probe of {checkpoint.absolute()}.", *missing]
    if recorded:
        head.append(f"In comments, with (sidecar): what a run takes from {SIDECAR}, unless it is set.")
    return as_toml(choices, head)


def _run(checkpoint: Path, document: dict[str, Any]) -> list[Choice]:
    chosen = [Choice("policy.checkpoint", str(checkpoint), "adapter, optimizer state and tokenizer")]
    base = (document["names"] or {}).get("base")
    if base and not Path(base).is_absolute() and Path(base).exists():
        chosen.append(Choice("policy.base", base, "as saved with the adapter, relative to this folder"))
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


def _sampling(checkpoint: Path, recorded: Mapping[str, Any], rows: Sequence[Row]) -> list[Choice]:
    default = Config().sampling
    chosen = [Choice("sampling.B_E", default.B_E, "the standard error falls as 1/sqrt(B_E)")]
    chosen += [
        _of_run(recorded, f"sampling.{key}", name, getattr(default, key))
        for key, name in (
            ("G", "num_generations"),
            ("max_new_tokens", "max_completion_length"),
            ("temperature", "temperature"),
        )
    ]
    group = chosen[1].value
    size, why = _prompts_of_a_step(checkpoint, recorded, group)
    is_set = "sampling.B_U" not in recorded
    if size > len(rows):
        size, why, is_set = len(rows), f"{why}, but there are {len(rows)} prompts", True
    return [*chosen, Choice("sampling.B_U", size, why, is_set)]


def _prompts_of_a_step(checkpoint: Path, recorded: Mapping[str, Any], group: int) -> tuple[int, str]:
    """B_U, and where it is from."""
    if size := recorded.get("sampling.B_U"):
        return size, f"the run's step had {size * group} sequences (sidecar)"
    try:
        state = strict_json.parse((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"), nan=True)
    except (OSError, ValueError):
        state = None
    batch = state.get("train_batch_size") if isinstance(state, dict) else None
    aim = "B_U x G should be the sequences of one optimizer step"
    if type(batch) is int and batch > 0:
        source = f"train_batch_size is {batch} ({TRAINER_STATE}), for one process and micro-batch"
        return max(2, batch // group), f"{source}; {aim}"
    return Config().sampling.B_U, f"the run's batch is not recorded; {aim}"


def _chat_template_kwargs(sidecar: Sidecar | None) -> list[Choice]:
    arguments = sidecar.sampling.get("chat_template_kwargs") if sidecar else None
    if not arguments:
        return []
    return [Choice("prompts.chat_template_kwargs", arguments, "of the run (sidecar)")]


def _objective(recorded: Mapping[str, Any], sidecar: Sidecar | None) -> list[Choice]:
    kind = loss_type(sidecar) if sidecar else None
    names = {
        "preset": "loss_type",
        "loss": "kind of loss",
        "settings": "settings of its loss",
        "advantage": "scale_rewards",
        "constant": "max_completion_length",
    }
    chosen = [
        Choice(f"objective.{key}", recorded[f"objective.{key}"], f"the run's {name} (sidecar)", False)
        for key, name in names.items()
        if f"objective.{key}" in recorded
    ]
    if not {"objective.preset", "objective.loss"} & recorded.keys():
        why = (
            "not recorded; TRL's default: set the run's"
            if kind is None
            else f"no preset has the gradient of the run's loss_type, {kind}"
        )
        preset = Config().objective.preset
        chosen.append(Choice("objective.preset", preset, why))
        scale = sidecar.loss.get("scale_rewards") if sidecar else None
        advantage = ADVANTAGES.get(str(scale), PRESETS[preset].advantage)
        if advantage != PRESETS[preset].advantage:
            chosen.append(Choice("objective.advantage", advantage, f"the run's scale_rewards, {scale}"))
    return chosen


def _optimizer(document: dict[str, Any], recorded: Mapping[str, Any]) -> list[Choice]:
    clip = _of_run(recorded, "optimizer.max_grad_norm", "max_grad_norm", DEFAULT_MAX_GRAD_NORM)
    if not (document["names"] or {}).get("verified_by_gradients"):
        return [clip]
    return [
        clip,
        Choice(
            "optimizer.accept_positional",
            True,
            "the state has no names (ParamNamesCallback saves them): the trainer's order is replayed, "
            "and the gradients on U must confirm it; true trusts it where they leave it open",
            False,
        ),
    ]


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


def _of_run(recorded: Mapping[str, Any], key: str, name: str, default: Any) -> Choice:
    """A number that a run takes from the sidecar, else a default."""
    if key in recorded:
        return Choice(key, recorded[key], f"the run's {name} (sidecar)", False)
    return Choice(key, default, f"the run's {name} is not recorded: set it, if it was not {default:g}")
