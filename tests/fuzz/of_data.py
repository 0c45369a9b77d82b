"""Rollouts, logs of trainers, data sets, chat templates and tokenizers."""

from functools import cache
from pathlib import Path
from typing import Any

from funcprobe.adapters.rollouts import parse_rollouts
from funcprobe.adapters.rollouts.files import read_columns
from funcprobe.adapters.rollouts.imports import Guesses, import_columns, layout_of
from funcprobe.adapters.rollouts.provenance import TrainingRun
from funcprobe.adapters.rollouts.schema import to_batch
from funcprobe.adapters.sampling.encoding import encode_prompts
from funcprobe.adapters.sampling.prompts import load_prompts, render_prompts
from funcprobe.types import InputError
from support.checkpoints import character_tokenizer

from .codecs import json_lines, json_text, parquet
from .target import Target, pair, written

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"


@cache
def tokenizer() -> Any:
    found = character_tokenizer()
    found.chat_template = TEMPLATE
    return found


def _rollouts(name: str) -> Any:
    def read(data: bytes, folder: Path) -> None:
        file = read_columns(written(folder, name, data))
        layout = layout_of(file)
        if layout is not None:
            run = TrainingRun(folder, 5, {}, {})
            guesses = Guesses(tokenizer(), [1], 1.0, 12, None, run)
            file, _ = import_columns(file, layout, guesses, advantages=False)
        said = []
        for options in ({"rewards": True}, {"rewards": False, "advantages": True}):
            try:
                to_batch(parse_rollouts(file, 14, eos_ids=[1], **options))
            except InputError as error:
                said.append(error)
        if len(said) == 2:
            raise said[0]

    return read


ROW = {
    "prompt_index": 0,
    "prompt_ids": [2, 3],
    "response_ids": [4, 5, 1],
    "temperature": 1.0,
    "reward": 1.0,
    "finish_reason": "stop",
    "sampler_logp": [-0.5, -1.0, -0.1],
    "step": 6,
    "advantage": 0.5,
}
LOSS = {
    "old_logp": [-0.5, -1.0, -0.1],
    "ref_logp": [-0.5, -1.0, -0.1],
    "loss_mask": [True, True, False],
    "microbatch": 0,
    "process": 0,
    "generated_tokens": 6.0,
    "entropy_coef": 0.0,
}
TRL = {"step": 6, "prompt": "3+4=", "completion": "7", "advantage": 0.5, "length": 1.0}
MESSAGES = [{"role": "user", "content": "3+4="}]
VERL = {"step": 6, "input": "3+4=", "output": "7", "score": 1.0, "gts": "7", "uid": "a_0_0"}
ROLLOUTS = (
    [ROW, ROW | {"prompt_index": 1, "reward": 0.0}],
    [ROW | LOSS, ROW | LOSS | {"prompt_index": 1}],
    [TRL, TRL],
    [TRL | {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "7"}]}] * 2,
    [VERL, VERL | {"uid": "b_0_0", "input": "5+4="}],
)


def _prompts(name: str) -> Any:
    def read(data: bytes, folder: Path) -> None:
        examples = load_prompts(str(written(folder, name, data)), prompt_column="prompt")
        prompts, _ = render_prompts(examples, tokenizer())
        encode_prompts(prompts, tokenizer())

    return read


PROMPTS = (
    [{"prompt": "3+4=", "answer": "7"}, {"prompt": "5+4=", "answer": "9"}],
    [{"prompt": MESSAGES, "answer": 7, "tools": [{"name": "f"}]}],
    [{"prompt": '[{"role": "user", "content": "1+1="}]', "chat_template_kwargs": {"x": 1}}],
)
CSV = (b"prompt,answer\n3+4=,7\n5+4=,9\n", b'prompt,answer\r\n"3,\n4",7\r\n')


def targets() -> list[Target]:
    return [
        *pair("rollouts.jsonl", _rollouts("r.jsonl"), ROLLOUTS, json_lines),
        *pair("rollouts.parquet", _rollouts("r.parquet"), ROLLOUTS, parquet),
        *pair("prompts.jsonl", _prompts("p.jsonl"), PROMPTS, json_lines),
        *pair("prompts.json", _prompts("p.json"), PROMPTS, json_text),
        *pair("prompts.parquet", _prompts("p.parquet"), PROMPTS, parquet),
        Target("prompts.csv", _prompts("p.csv"), lambda: CSV),
    ]
