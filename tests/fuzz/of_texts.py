"""Configurations, expressions, logs and answers of servers: texts."""

import tomllib
from pathlib import Path
from typing import Any

from funcprobe.adapters.checkpoint.trainer_state import FILE, trained_steps
from funcprobe.adapters.checkpoint.training_log import training_log
from funcprobe.adapters.config.file import read_config, to_toml
from funcprobe.adapters.config.schema import SamplingConfig
from funcprobe.adapters.sampling.completions import AnswerError, Asked, body
from funcprobe.adapters.sampling.completions import read as read_answer
from funcprobe.rules import expressions, grammar, registry
from funcprobe.types import InputError
from support.paths import ROOT
from support.rule_cases import case

from .codecs import json_text, toml_text
from .target import Target, pair, written


def _config(data: bytes, folder: Path) -> None:
    """What is accepted can be written and read again, as a run does with it."""
    found = read_config(written(folder, "c.toml", data))
    text = to_toml(found)
    again = read_config(written(folder, "again.toml", text.encode()))
    assert again.model_dump(exclude={"run": {"folder"}}) == found.model_dump(
        exclude={"run": {"folder"}}
    )


def _set(data: bytes, folder: Path) -> None:
    """`--set`, one a line."""
    given = [x for x in data.decode("utf-8", "replace").split("\n") if x][:4]
    read_config(written(folder, "c.toml", b""), given)


def _configs() -> list[Any]:
    found = [tomllib.loads(path.read_text()) for path in sorted((ROOT / "configs").glob("*.toml"))]
    return [*found, {"objective": {"settings": {"beta": 0.1}}, "measure": {"etas": [1e-6]}}]


SETS = (b"sampling.B_E=64\nobjective.settings.beta=0.04", b"measure.etas=[1e-6, 1e-5]", b"run.name=x")


def _rule(data: bytes, folder: Path) -> None:
    registry.rule(data.decode("utf-8", "replace"))


def _expression(data: bytes, folder: Path) -> None:
    """What is accepted can be evaluated, to one value for each token."""
    text = data.decode("utf-8", "replace")
    kinds: tuple[grammar.Kind, ...] = ("number", "condition")
    said = []
    for kind in kinds:
        try:
            found = grammar.parse(text, kind)
        except InputError as error:
            said.append(error)
            continue
        inputs = case().inputs
        shape = expressions.evaluate(found, inputs).shape
        assert shape == inputs.mask_NR.shape
    if len(said) == 2:
        raise said[0]


RULES = (b"clip:0.2,0.28", b"mask:advantage < 0 and surprisal > 4", b"kl_cov", b"drop_prompt:3")
EXPRESSIONS = (
    b"advantage > 0 or surprisal < 4",
    b"where(advantage < 0, rank(entropy), quantile(surprisal, 0.5)) ** 2",
    b"not (min(advantage, 1, 2) >= -1e3) and abs(log(exp(entropy))) != 0",
)


def _state(data: bytes, folder: Path) -> None:
    written(folder, FILE, data)
    said = []
    for read in (trained_steps, training_log):
        try:
            read(folder)
        except InputError as error:
            said.append(error)
    if said:
        raise said[0]


STATES = (
    {
        "global_step": 3,
        "log_history": [
            {"step": 1, "entropy": 0.5, "learning_rate": 1e-6, "loss": float("nan")},
            {"step": 2, "entropy": float("inf"), "grad_norm": -float("inf")},
            {"step": 2, "eval_loss": 1.5},
        ],
    },
)

ASKED = Asked([2, 3, 4], 6, [1], 14)
ANSWER = {
    "model": "policy",
    "choices": [
        {
            "finish_reason": "stop",
            "token_ids": [2, 3, 1],
            "prompt_token_ids": [2, 3, 4],
            "logprobs": {
                "tokens": ["token_id:2", "token_id:3", "token_id:1"],
                "token_logprobs": [-0.5, -1.0, -0.0],
            },
        }
    ],
}


def _answer(data: bytes, folder: Path) -> None:
    body(ASKED, "policy", SamplingConfig(), 1)
    try:
        read_answer(data.decode("utf-8", "replace"), ASKED, "policy")
    except AnswerError as error:
        raise InputError(str(error)) from error


def targets() -> list[Target]:
    return [
        *pair("config", _config, _configs(), toml_text),
        Target("set", _set, lambda: SETS),
        Target("rule", _rule, lambda: RULES),
        Target("expression", _expression, lambda: EXPRESSIONS),
        *pair("trainer_state", _state, STATES, json_text),
        *pair("answer", _answer, [ANSWER], json_text),
    ]
