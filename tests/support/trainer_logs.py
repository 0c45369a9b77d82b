"""What trainers log of their rollouts: TRL's files by a real GRPOTrainer, verl's by their layout."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from funcprobe.adapters.rollouts import parse_rollouts
from funcprobe.adapters.rollouts.files import Columns, read_columns
from funcprobe.adapters.rollouts.imports import Guesses, import_columns, layout_of
from funcprobe.adapters.rollouts.provenance import TrainingRun
from funcprobe.adapters.sampling.rewards import load_reward
from funcprobe.adapters.trainers import ParamNamesCallback
from funcprobe.types import InputError
from support.checkpoints import PIECES, Checkpoint, character_tokenizer

G, LONGEST, EOS = 3, 12, 1
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)

# Every function keeps the keywords it was called with.
FUNCTIONS = """
CALLS = {"length": [], "first_one": [], "partly": []}

def length(prompts, completions, completion_ids, **columns):
    columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    CALLS["length"].append(columns)
    return [len(ids) / 4 for ids in completion_ids]

def first_one(completions, answer, **columns):
    CALLS["first_one"].append(None)
    columns["log_extra"]("length_in_text", [len(text) for text in completions])
    return [ord(text[:1] or "z") / 8 - 0.125 * len(a) for text, a in zip(completions, answer)]

def partly(completions, **columns):
    CALLS["partly"].append(None)
    of = [None, 1.0, 0.25, None, None, 2.0, None, None, None, 1.0, 0.0, 7.0]
    return of[: len(completions)]
"""


class Trained(NamedTuple):
    """A training step of TRL: the file it wrote, and what its first reward function was given."""

    file: Path
    call: dict[str, Any]
    functions: Path

    def exact(self) -> list[list[int]]:
        return [list(ids) for ids in self.call["completion_ids"]]


def train(
    checkpoint: Checkpoint, folder: Path, names: list[str], *, chat: bool = False, **settings: Any
) -> Trained:
    """One step of GRPOTrainer on 4 prompts with 3 completions each, completions logged.

    Saved as checkpoint-1, with its sidecar.
    """
    functions = folder / "functions.py"
    functions.write_text(FUNCTIONS)
    load_reward(f"{functions}:length")
    module = sys.modules["funcprobe_reward_functions"]
    found, calls = [getattr(module, name) for name in names], module.CALLS["length"]
    tokenizer = character_tokenizer()
    rows = [json.loads(line) for line in checkpoint.prompts.read_text().splitlines()]
    if chat:
        tokenizer.chat_template = TEMPLATE
        for row in rows:
            text = row["prompt"].removesuffix("=")
            row["prompt"] = [{"role": "system", "content": "7"}, {"role": "user", "content": text}]
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base)
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4 * G,
        "num_generations": G,
        "max_completion_length": LONGEST,
        "generation_kwargs": {"suppress_tokens": [0]},  # <pad>, which no text shows
        "log_completions": True,
        "logging_steps": 1,
        "report_to": [],
        "save_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = GRPOConfig(**(given | settings))
    trainer = GRPOTrainer(
        model=PeftModel.from_pretrained(base, checkpoint.adapter, is_trainable=True),
        reward_funcs=found,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[ParamNamesCallback()],
    )
    with torch.random.fork_rng():
        trainer.train()
    file = folder / "completions" / "completions_00001.parquet"
    return Trained(file, calls[0] if calls else {}, functions)


def guesses(**changes: Any) -> Guesses:
    given = {"tokenizer": character_tokenizer(), "eos_ids": (EOS,), "temperature": 1.0}
    given |= {"max_new_tokens": LONGEST, "prompts": {}, "run": run_before(1)}
    return Guesses(**(given | changes))


def run_before(step: int | None, loss: dict[str, Any] | None = None) -> TrainingRun:
    """What the checkpoint says, of which that step is the next."""
    return TrainingRun(Path("checkpoint"), None if step is None else step - 1, loss or {}, {})


def imported(file: Path | Columns, *, advantages: bool = False, **changes: Any):
    """U as a run takes it, and the warnings. verl's fixtures are of step 6, TRL's of step 1."""
    columns = read_columns(file) if isinstance(file, Path) else file
    layout = layout_of(columns)
    assert layout is not None
    if layout == "verl":
        changes = {"run": run_before(6)} | changes
    mine, lines = import_columns(columns, layout, guesses(**changes), advantages=advantages)
    needs = {"rewards": not advantages, "advantages": advantages}
    return parse_rollouts(mine, len(PIECES), **needs, eos_ids=(EOS,)), lines


def changed(columns: Columns, **values: list) -> Columns:
    rows = len(next(iter(values.values()), columns.place))
    merged = {k: v[:rows] for k, v in columns.values.items()} | values
    return Columns(columns.path, columns.place[:rows], merged)


def refusal(columns: Columns, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        imported(columns, **options)
    assert str(columns.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def dumped(path: Path, ids: list[tuple[list[int], list[int]]], scores: list[float], **more: list):
    """As verl 0.9.1 writes it (`_log_rollout_data`, `_write_generations`), whose wheel needs a GPU
    stack: ids decoded without special tokens, a row a line, what else there is behind."""
    tokenizer = character_tokenizer()
    columns = {
        "input": [tokenizer.decode(x, skip_special_tokens=True) for x, _ in ids],
        "output": [tokenizer.decode(y, skip_special_tokens=True) for _, y in ids],
        "gts": ["7"] * len(ids),
        "score": scores,
        "step": [6] * len(ids),
    } | more
    rows = zip(*columns.values(), strict=True)
    lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


A, B = [EOS, 5, 12, 6, 13], [EOS, 7, 12, 6, 13]  # <eos> stands for the marks of a chat template
SAMPLED = [(A, [3, 4, EOS]), (B, [EOS]), (A, [9] * LONGEST), (B, [9] * (LONGEST - 1) + [EOS])]
