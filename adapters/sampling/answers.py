"""Scores of a completion against a reference answer: by exact decimals, or by math_verify."""

import re
from decimal import Decimal

from funcprobe.types import InputError

from .prompts import missing_column

ANSWER_MARK = "####"  # precedes the final answer in GSM8K


def reference_answer(row: dict[str, object], i: int, column: str) -> str:
    """The text after the last "####" of the column, or all of it. InputError if not text or number.

    The ground truth of verl's column reward_model has precedence.
    """
    value = ground_truth_of_verl(row)
    if value is None and column not in row:
        raise missing_column(column, row, f"the row of response {i}")
    value = row[column] if value is None else value
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise InputError(
            f"response {i}: column {column!r} contains {type(value).__name__}, expected text or a "
            "number: choose another answer_column"
        )
    return str(value).rpartition(ANSWER_MARK)[2].strip()


def ground_truth_of_verl(row: dict[str, object]) -> object:
    """That of the column reward_model; None if there is none."""
    model = row.get("reward_model")
    return model.get("ground_truth") if isinstance(model, dict) else None


# A comma separates thousands only in groups of the right size (1,234,567 or Indian 12,34,567), so
# that "1,2" stays two numbers. A minus after a digit, letter or bracket is a subtraction, and one
# before a space marks a list item.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?\$?(?P<sign2>(?<=\$)-)?"
    r"(?P<digits>(?<![0-9])[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)


def numeric_score(completion: str, reference: str, where: str) -> float:
    """1 if the completion's number is the reference as an exact decimal, else 0; see `load_reward`."""
    expected = _exact(reference)
    if expected is None:
        raise InputError(
            f'{where} ends in {reference[-40:]!r}, expected a number, alone or after "####": '
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


def math_score(completion: str, reference: str, where: str) -> float:
    """1 if math_verify finds the completion's answer equal to the reference, else 0."""
    from math_verify import parse, verify  # imports sympy, so only on demand

    # Outside LaTeX delimiters the parser looks for a plain number and reads 2\sqrt{3} as 2
    # (math-verify 0.9.0), so that a formula without them gets them; prose does not, as its words would
    # become products.
    marked = "$" + reference + "$"
    has_marks = any(mark in reference for mark in ("$", r"\boxed", r"\(", r"\["))
    outside_commands = re.sub(r"\\[A-Za-z]+\s*(\{[^{}]*\})?", " ", reference)
    prose = has_marks or re.search(r"[A-Za-z]{2,}", outside_commands)
    gold = (parse(reference) or parse(marked)) if prose else (parse(marked) or parse(reference))
    if not gold:
        raise InputError(
            f"{where} ends in {reference[-40:]!r}, which math_verify cannot parse: drop the row or "
            "choose another answer_column"
        )
    return float(verify(gold, parse(completion)))
