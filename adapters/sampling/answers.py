"""A reference answer, and the score of a completion's number against it, as exact decimals."""

import re
from decimal import Decimal

from funcprobe.types import InputError

from .prompts import missing_column

ANSWER_MARK = "####"  # precedes the final answer in GSM8K

MINUS = r"-\u2010-\u2013\u2212\ufe63\uff0d"  # hyphens, en dash, minus sign; of a character class
CURRENCY = r"$\u00a2-\u00a5\u20a0-\u20cf"  # dollar, cent, pound, yen, euro and others; likewise
# What separates thousands beside the comma: LaTeX's spaces and {,}, no-break and thin spaces, an
# apostrophe.
LATEX_COMMA = r"\{,\}|,\\!|\\[,!;: ]|[\u00a0\u2007\u2009\u202f'\u2019]"


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
# that "1,2" stays two numbers; LaTeX's {,} is a decimal comma in any other. A minus after a digit,
# letter or bracket is a subtraction or a range, and one before a space marks a list item.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[{MINUS}])?(?:\\?[{CURRENCY}](?:[ \u00a0~]|\\,)?)?"
    rf"(?P<sign2>(?<=[{CURRENCY}])[{MINUS}])?"
    rf"(?P<digits>(?<![0-9])[0-9]{{1,3}}(?:(?:,|{LATEX_COMMA})[0-9]{{2,3}})*"
    rf"(?:,\\!|,|{LATEX_COMMA})[0-9]{{3}}(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+(?:(?:\.|\{,\})[0-9]+)?|\.[0-9]+)"
)
_AFTER = re.compile(rf"\s*(?:\\?%|\\?[{CURRENCY}]|\u00b0|\^\{{?\\circ\}}?)?\.?")


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
    """The number that a text is, without its unit of money, percent or degrees."""
    match = _NUMBER.match(text.removeprefix("+"))
    rest = text.removeprefix("+")[match.end() :] if match else ""
    return _decimal(match) if match and _AFTER.fullmatch(rest) else None


def _decimal(match: re.Match[str]) -> Decimal:
    digits = match["digits"]
    if re.fullmatch(r"[0-9]+\{,\}[0-9]+", digits) and not re.fullmatch(
        r"[0-9]{1,3}\{,\}[0-9]{3}", digits
    ):
        digits = digits.replace("{,}", ".")
    value = Decimal(re.sub(r"[^0-9.]", "", digits))
    # copy_negate, as unary minus would round to the context's 28 digits
    return value.copy_negate() if match["sign"] or match["sign2"] else value
