"""Rewards of completions: numeric answers, math answers, or a user's own function."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from importlib.machinery import SourceFileLoader
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor

from funcprobe.types import InputError

from .prompts import missing_column

BUILT_IN = ("numeric", "math")
ANSWER_MARK = "####"  # GSM8K writes its final answer behind it


Texts: TypeAlias = Sequence[str]
Ids: TypeAlias = Sequence[Sequence[int]]
Rows: TypeAlias = Sequence[dict[str, object]]


class Reward(Protocol):
    """Reward of every completion, [N], float64; `rows[i]` is the dataset's row of prompt i."""

    def __call__(
        self, prompts: Texts, completions: Texts, completion_ids: Ids, rows: Rows
    ) -> Float64[Tensor, " N"]: ...


def load_reward(spec: str, *, answer_column: str = "answer") -> Reward:
    """The reward named by `spec`; the reference answer of the built-in ones is in `answer_column`.

    "numeric": 1 if the completion's number equals the reference's as an exact decimal, else 0. The
    reference is what follows the last "####" of the column, or all of it; the prediction is the
    first number behind the completion's last "####", or without one its last number. "$" and
    thousands' commas do not count. Fractions and powers of ten are for "math".

    "math": 1 if `math_verify` finds prediction and reference equal, else 0, also where its own
    limit of 5 seconds runs out. It sets an alarm signal: main thread only.

    "module:function", "path/to/file.py:function": f(prompts, completions, completion_ids,
    **columns) -> list of float, called as TRL's GRPOTrainer does, with those keywords it takes;
    the columns are lists with an entry per completion. Completions are plain text here, also for
    chat prompts, where TRL passes lists of messages.

    Raises InputError if there is no such reward; the reward itself does for a missing column, an
    unusable reference, an exception in the function, a result of another length or not finite.
    """
    if spec in BUILT_IN:
        score = _numeric_score if spec == "numeric" else _math_score
        return _built_in(score, answer_column)
    module, colon, name = spec.rpartition(":")
    if not (colon and module and name):
        raise InputError(
            f'unknown reward {spec!r}: expected one of {", ".join(BUILT_IN)}, "module:function" or '
            '"path/to/file.py:function"'
        )
    found = _module(module)
    function = getattr(found, name, None)
    if not callable(function):
        there = [n for n, f in vars(found).items() if inspect.isfunction(f)]
        raise InputError(
            f"{module} has no function {name!r}, its functions are: "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    return _user_reward(spec, function)


def _built_in(score: Callable[[str, str, str], float], answer_column: str) -> Reward:
    def reward(prompts: Texts, completions: Texts, completion_ids: Ids, rows: Rows) -> Tensor:
        _require_lengths(prompts, completions, completion_ids, rows)
        references = [_reference(row, i, answer_column) for i, row in enumerate(rows)]
        scores = [
            score(completion, reference, f"response {i}: column {answer_column!r}")
            for i, (completion, reference) in enumerate(zip(completions, references, strict=True))
        ]
        return torch.tensor(scores, dtype=torch.float64)

    return reward


def _reference(row: dict[str, object], i: int, column: str) -> str:
    if column not in row:
        raise missing_column(column, row, f"the row of response {i}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise InputError(
            f"response {i}: column {column!r} holds {type(value).__name__}, expected text or a "
            "number: choose another answer_column"
        )
    return str(value).rpartition(ANSWER_MARK)[2].strip()


# A comma separates thousands only in groups of the right size (1,234,567 or Indian 12,34,567), so
# that "1,2" stays two numbers. A minus behind a digit, letter or bracket subtracts, and one before
# a space marks an item of a list.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?\$?(?P<sign2>(?<=\$)-)?"
    r"(?P<digits>(?<![0-9])[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)


def _numeric_score(completion: str, reference: str, where: str) -> float:
    expected = _exact(reference)
    if expected is None:
        raise InputError(
            f'{where} ends in {reference[-40:]!r}, expected a number, alone or behind "####": '
            "choose another answer_column or reward"
        )
    _, mark, tail = completion.rpartition(ANSWER_MARK)
    numbers = [_decimal(match) for match in _NUMBER.finditer(tail)]
    if not numbers:
        return 0.0
    return float((numbers[0] if mark else numbers[-1]) == expected)


def _exact(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.removesuffix("."))
    return _decimal(match) if match else None


def _decimal(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    # copy_negate, as unary minus would round to the context's 28 digits
    return value.copy_negate() if match["sign"] or match["sign2"] else value


def _math_score(completion: str, reference: str, where: str) -> float:
    from math_verify import parse, verify  # sympy, only where it is asked for

    # Outside of LaTeX marks the parser looks for a plain number and reads 2\sqrt{3} as 2
    # (math-verify 0.9.0), so a bare formula is marked; prose is not, or words become products.
    marked = "$" + reference + "$"
    has_marks = any(mark in reference for mark in ("$", r"\boxed", r"\(", r"\["))
    outside_commands = re.sub(r"\\[A-Za-z]+\s*(\{[^{}]*\})?", " ", reference)
    prose = has_marks or re.search(r"[A-Za-z]{2,}", outside_commands)
    gold = (parse(reference) or parse(marked)) if prose else (parse(marked) or parse(reference))
    if not gold:
        raise InputError(
            f"{where} ends in {reference[-40:]!r}, which math_verify cannot read: drop the row or "
            "choose another answer_column"
        )
    return float(verify(gold, parse(completion)))


def _module(name: str) -> ModuleType:
    path = Path(name).expanduser()
    if path.suffix != ".py":
        hint = "; a file is named by its path, as ./rewards.py:function"
        imported: ModuleType = _users_code(
            lambda: importlib.import_module(name), f"importing {name}", hint
        )
        return imported
    if not path.is_file():
        raise InputError(f"file not found: {name} (from {Path.cwd()}): correct the path")
    module = ModuleType(f"funcprobe_reward_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up there
    loader = SourceFileLoader(module.__name__, str(path))
    _users_code(lambda: loader.exec_module(module), f"importing {name}")
    return module


def _user_reward(spec: str, function: Callable[..., Any]) -> Reward:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"reward {spec!r} has no readable signature: {error}") from error
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward {spec!r} is asynchronous, expected a plain function: await inside")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

    def reward(prompts: Texts, completions: Texts, completion_ids: Ids, rows: Rows) -> Tensor:
        _require_lengths(prompts, completions, completion_ids, rows)
        columns = sorted(set().union(*rows))
        offered: dict[str, object] = {c: [row.get(c) for row in rows] for c in columns}
        arguments = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": [list(ids) for ids in completion_ids],
            # What TRL passes too; there is no trainer here, and nothing to log to.
            "trainer_state": None,
            "log_extra": _no_log,
            "log_metric": _no_log,
        }
        if taken := arguments.keys() & offered.keys():
            raise InputError(f"column {min(taken)!r} has an argument's name: rename the column")
        offered |= arguments
        for parameter in named:
            if parameter.name not in offered and parameter.default is parameter.empty:
                raise missing_column(parameter.name, columns, f"reward {spec!r}: the dataset")
        wanted = set(offered) if takes_all else {p.name for p in named} & set(offered)
        result = _users_code(
            lambda: function(**{key: offered[key] for key in wanted}), f"reward {spec!r}"
        )
        return _checked(spec, result, len(completions))

    return reward


def _checked(spec: str, result: Any, count: int) -> Tensor:
    values = result.tolist() if hasattr(result, "tolist") else result  # a tensor, an array
    if not isinstance(values, list | tuple) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list | tuple) else type(values)
        raise InputError(f"reward {spec!r} returned {found}, expected a list of {count} numbers")
    for i, value in enumerate(values):
        if value is None:
            raise InputError(
                f'reward {spec!r} returned None ("not applicable" to a trainer) for response {i}, '
                "expected a number: drop such rows, or return a number"
            )
        if not isinstance(value, Real) and not (torch.is_tensor(value) and value.numel() == 1):
            raise InputError(
                f"reward {spec!r} returned {type(value).__name__} for response {i}, expected a number"
            )
        # NaN compares false; an integer may be too large for a float, and too long to print.
        if not bool(abs(value) <= sys.float_info.max):  # type: ignore[arg-type, operator]
            found = value if isinstance(value, float) else "a number out of range"
            raise InputError(f"reward {spec!r} returned {found} for response {i}, expected finite")
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _users_code(run: Callable[[], Any], what: str, hint: str = "") -> Any:
    try:
        return run()
    # Broad, because it is the user's code, which may raise anything, and nothing goes on from
    # here: the exception comes back as what it is, an input that cannot be used.
    except (Exception, SystemExit) as error:
        raised = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{what} raised {raised}{hint}") from error


def _require_lengths(*lists: Sequence[object]) -> None:
    if len({len(x) for x in lists}) != 1:
        raise InputError(f"found lists of {[len(x) for x in lists]}, expected one entry a response")


def _no_log(*_: object, **__: object) -> None:
    """Stands in for TRL's log_extra and log_metric."""
