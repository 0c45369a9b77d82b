"""Rewards of completions: numeric answers, math answers, or a user-defined function.

A function is called as by the trainer for which it was written, TRL or verl.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor

from funcprobe.types import InputError

from .answers import ground_truth_of_verl, numeric_score, reference_answer
from .functions import load_function, users_code
from .math_answers import math_score
from .messages import Messages
from .prompts import missing_column

BUILT_IN = ("numeric", "math")

Text: TypeAlias = str | Messages
Ids: TypeAlias = Sequence[Sequence[int]]
Rows: TypeAlias = Sequence[dict[str, object]]


class Reward(Protocol):
    """Reward of every completion, [N], float64; NaN: not applicable (TRL's None).

    `rows[i]` is the dataset's row of prompt i.
    """

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[str], completion_ids: Ids, rows: Rows
    ) -> Float64[Tensor, " N"]: ...


def load_reward(
    spec: str, *, answer_column: str = "answer", conversational: bool | None = None
) -> Reward:
    """The reward named by `spec`; the reference answer of the built-in ones is in `answer_column`.

    "numeric": 1 if the completion's number equals the reference's as an exact decimal, else 0. The
    reference is the text after the last "####" of the column, or all of it; the prediction is the
    first number after the completion's last "####", or its last number if there is none. Currency,
    percent and thousands separators are ignored. For fractions and powers of ten use "math".

    "math": 1 if `math_verify` finds prediction and reference equal within 5 seconds, else 0 (as inside
    an unclosed last box). It sets an alarm signal, which needs the main thread.

    "module:function", "path/to/file.py:function": a user-defined function with TRL's signature, or,
    recognised by the parameters solution_str and ground_truth, with verl's; see `_trl_reward`
    and `_verl_reward`. `conversational`: prompts and completions are messages, for TRL's signature; by
    default, as in TRL, if the prompts are.

    Raises InputError if there is no such reward; the reward itself does for a missing column, an
    unusable reference, an exception in the function, a result of another length or not finite.
    """
    if spec in BUILT_IN:
        score = numeric_score if spec == "numeric" else math_score
        _require_text(spec, conversational)
        return _built_in(score, answer_column)
    function = load_function(spec, "reward", f"one of {', '.join(BUILT_IN)}")
    name = f"reward {spec!r}"
    if {"solution_str", "ground_truth"} <= _signature(function, name).keys():
        _require_text(spec, conversational)
        return _verl_reward(name, function, answer_column=answer_column)
    return _trl_reward(name, function, conversational=conversational)


def load_observable(spec: str, *, conversational: bool | None = None) -> Reward:
    """A function of the response that `spec` names, called as TRL calls a reward (`_trl_reward`).

    It returns a number, or None where it does not apply, for every response. Errors as `load_reward`.
    """
    function = load_function(spec, "observable", "a name in the table of measure.observables")
    return _trl_reward(f"observable {spec!r}", function, conversational=conversational)


def _built_in(score: Callable[[str, str, str], float], answer_column: str) -> Reward:
    def reward(
        prompts: Sequence[Text], completions: Sequence[str], completion_ids: Ids, rows: Rows
    ) -> Tensor:
        _require_lengths(prompts, completions, completion_ids, rows)
        references = [reference_answer(row, i, answer_column) for i, row in enumerate(rows)]
        scores = [
            score(completion, reference, f"response {i}: column {answer_column!r}")
            for i, (completion, reference) in enumerate(zip(completions, references, strict=True))
        ]
        return torch.tensor(scores, dtype=torch.float64)

    return reward


def _trl_reward(name: str, function: Callable[..., Any], *, conversational: bool | None) -> Reward:
    """f(prompts, completions, completion_ids, **columns) -> list of float or None, called once.

    As by TRL 1.16's GRPOTrainer (`_calculate_rewards`), with the keywords that it accepts; the columns
    are lists with one entry per completion. trainer_state is None, as there is no training. With
    `conversational` a completion is a list of one assistant message, and prompts are lists of
    messages. None becomes NaN, as in TRL.
    """

    def reward(
        prompts: Sequence[Text], completions: Sequence[str], completion_ids: Ids, rows: Rows
    ) -> Tensor:
        _require_lengths(prompts, completions, completion_ids, rows)
        columns = sorted(set().union(*rows))
        offered: dict[str, object] = {c: [row.get(c) for row in rows] for c in columns}
        messages = bool(prompts) and isinstance(prompts[0], list)
        as_chats = messages if conversational is None else conversational
        chats = [[{"role": "assistant", "content": text}] for text in completions]
        arguments: dict[str, object] = {
            "prompts": list(prompts),
            "completions": chats if as_chats else list(completions),
            "completion_ids": [list(ids) for ids in completion_ids],
            "trainer_state": None,
            "log_extra": _no_log,
            "log_metric": _no_log,
        }
        if taken := arguments.keys() & offered.keys():
            raise InputError(f"column {min(taken)!r} has the name of an argument: rename the column")
        call = _call(function, offered | arguments, columns, f"{name}: the dataset")
        return _checked(name, users_code(call, name), len(completions))

    return reward


def _verl_reward(name: str, function: Callable[..., Any], *, answer_column: str) -> Reward:
    """compute_score(data_source, solution_str, ground_truth, extra_info) for each completion.

    As by verl 0.9.1's reward managers, with the keywords that it accepts; the score is the returned
    number, or "score" of a returned dict. data_source and extra_info are the row's columns (extra_info:
    {} if there is none, with the fields that verl adds for a single turn); ground_truth is that of the
    column reward_model, if it has one, else `answer_column` unchanged.
    """

    def reward(
        prompts: Sequence[Text], completions: Sequence[str], completion_ids: Ids, rows: Rows
    ) -> Tensor:
        _require_lengths(prompts, completions, completion_ids, rows)
        scores = []
        for i, (text, row) in enumerate(zip(completions, rows, strict=True)):
            offered: dict[str, object] = {
                "solution_str": text,
                "ground_truth": _ground_truth(row, i, answer_column),
                "extra_info": _extra_info(row, i),
            } | {key: row[key] for key in ("data_source",) if key in row}
            call = _call(function, offered, row, f"{name}: the row of response {i}")
            result = users_code(call, f"{name}, response {i},")
            if isinstance(result, dict) and "score" not in result:
                raise InputError(
                    f"{name} returned a dict without score for response {i}, its keys are: "
                    f"{', '.join(map(str, result)) or 'none'}; expected a number or a dict with score"
                )
            score = result["score"] if isinstance(result, dict) else result
            scores.append(_number(name, score, i))
        return torch.tensor(scores, dtype=torch.float64)

    return reward


def _require_text(spec: str, conversational: bool | None) -> None:
    if conversational:
        raise InputError(
            f"reward {spec!r} takes text; reward.conversational = true passes messages, and only to "
            "functions with TRL's signature: set it to false"
        )


def _require_lengths(*lists: Sequence[object]) -> None:
    """InputError unless all have one entry per response."""
    if len({len(x) for x in lists}) != 1:
        raise InputError(f"found lists of {[len(x) for x in lists]}, expected one entry per response")


def _signature(function: Callable[..., Any], what: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} has no readable signature: {error}") from error


def _call(
    function: Callable[..., Any], offered: dict[str, object], columns: Iterable[str], where: str
) -> Callable[[], Any]:
    """The function with the arguments of `offered` that it accepts; InputError if one is missing."""
    parameters = _signature(function, where).values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.name not in offered and parameter.default is parameter.empty:
            raise missing_column(parameter.name, columns, where)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    wanted = offered.keys() if takes_all else {p.name for p in named} & offered.keys()
    return partial(function, **{key: offered[key] for key in wanted})


def _ground_truth(row: dict[str, object], i: int, answer_column: str) -> object:
    found = ground_truth_of_verl(row)
    found = row.get(answer_column) if found is None else found
    if found is None:
        raise InputError(
            f"the row of response {i} has no ground truth, neither in verl's reward_model nor in "
            f"column {answer_column!r}, its columns are: {', '.join(sorted(row))}; set "
            "reward.answer_column"
        )
    return found


def _extra_info(row: dict[str, object], i: int) -> dict[str, object]:
    found = row.get("extra_info")
    if found is not None and not isinstance(found, dict):
        raise InputError(
            f"response {i}: column 'extra_info' contains {type(found).__name__}, expected a dict as in "
            "verl: rename the column"
        )
    return {**(found or {}), "num_turns": None, "rollout_reward_scores": {}}


def _checked(name: str, result: Any, count: int) -> Tensor:
    values = result.tolist() if hasattr(result, "tolist") else result  # a tensor, an array
    if not isinstance(values, list | tuple) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list | tuple) else type(values)
        raise InputError(f"{name} returned {found}, expected a list of {count} numbers")
    if all(value is None for value in values):
        raise InputError(
            f'{name} returned None ("not applicable" in TRL) for all {count} responses, '
            "expected numbers: use prompts to which it applies"
        )
    numbers = [
        float("nan") if value is None else _number(name, value, i) for i, value in enumerate(values)
    ]
    return torch.tensor(numbers, dtype=torch.float64)


def _number(name: str, value: Any, i: int) -> float:
    size = value.numel() if torch.is_tensor(value) else getattr(value, "size", 0)
    if size == 1:  # a number of torch or numpy; numpy's bool is not a Real
        value = value.item()
    if not isinstance(value, Real):
        raise InputError(f"{name} returned {type(value).__name__} for response {i}, expected a number")
    # NaN compares false; an integer may be too large for a float, and too long to print.
    if not bool(abs(value) <= sys.float_info.max):  # type: ignore[operator]
        found = value if isinstance(value, float) else "a number out of range"
        raise InputError(f"{name} returned {found} for response {i}, expected a finite number")
    return float(value)


def _no_log(*_: object, **__: object) -> None:
    """In place of TRL's log_extra and log_metric; does nothing."""
