r"""The score of a completion's answer against a reference by math_verify, given what it reads right.

math_verify (0.9) reads formulas between LaTeX delimiters. Elsewhere it looks for a number: 2 in
2\sqrt{3}, 64 in "27 and 64", 30 in "2 hours 30 minutes". Between delimiters it reads 9\,750 as a sum.
"""

import re
from typing import Any

from funcprobe.types import InputError

from .answers import CURRENCY, LATEX_COMMA, MINUS

_DELIMITER = re.compile(r"\$|\\[()\[\]]")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mbox|mathrm)\s*\{([^{}]*)\}")
_LONE = re.compile(r"(\\(?:text|textrm|mbox)\s*\{\s*)([A-Za-z])(?=\s*\})")  # a unit, as in 2 h 30 min
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,}")
_FUNCTION = re.compile(r"(?<![A-Za-z\\])(pi|sin|cos|tan|log|ln|exp)(?![A-Za-z])")
_JOINED = re.compile(
    r",?\s*(?:\\(?:text|textrm|mbox|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*"
)

# A formula outside delimiters: numbers, commands with their arguments, operators, single letters, and
# brackets around these.
_ARGUMENT = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_LETTER = r"(?<![A-Za-z])[A-Za-z](?![A-Za-z]|[ \t]+[\dA-Za-z\\])"  # no article, as in "a 2\pi"
_PAIR = rf"[(\[](?:[^()\[\]A-Za-z\n\\]|\\[^A-Za-z\n]|\\[A-Za-z]+|{_LETTER})*[)\]]"
_ATOM = (
    rf"(?:\\[A-Za-z]+|\\[\\,;:! {{}}]|{_ARGUMENT}|{_PAIR}|\d+(?:\.\d+)?|[()^_+\-*/=<>|!&]|{_LETTER})"
)
_FORMULA = re.compile(rf"{_ATOM}(?:[ \t]*{_ATOM})*")


def math_score(completion: str, reference: str, where: str) -> float:
    r"""1 if math_verify finds the completion's answer equal to the reference, else 0.

    A completion that ends inside its last \boxed{...} was cut off before its answer, and gets 0.
    """
    from math_verify import parse, verify  # imports sympy, so only on demand

    if not (gold := _gold(reference)):
        raise InputError(
            f"{where} ends in {reference[-40:]!r}, which cannot be read as an answer: a number, a "
            "formula, or several joined by commas, and, or is expected; drop the row or choose another "
            "answer_column"
        )
    # Hendrycks' MATH and verl take the last box alone; math_verify would go back to an earlier one.
    if _open_box(completion):
        return 0.0
    return float(verify(gold, parse(_delimited(_plain(completion)))))


def _gold(reference: str) -> list[Any]:
    """What math_verify reads in a reference; nothing where it would read a part of it."""
    from math_verify import parse

    text = _FUNCTION.sub(r"\\\1", _plain(reference))
    if re.search(r"\d*\.\d*\s*\\overline", text):
        return []
    if boxes := _boxes(text):  # a worked solution, of which only the boxes are the answer
        return [] if any(map(_is_mixed, boxes)) else list(parse(text))
    content = _DELIMITER.sub("", text)
    listed = _JOINED.sub(", ", content).strip().rstrip(".")
    if not _words(listed):
        apart = re.sub(r"frac\s*\d\s*\d|_\s*\d", "", listed)
        return [] if re.search(r"\d\s+\d", apart) else list(parse(f"${listed}$") or parse(text))
    return [] if _is_mixed(listed) else list(parse(_delimited(text)) or parse(f"${content}$"))


def _is_mixed(text: str) -> bool:
    """Whether numbers have words among them, as in 2 hours 30 minutes; a unit's power is no number."""
    spoken = re.sub(r"([A-Za-z]{2,})\s*\^\s*\{?\d\}?", r"\1", _spoken(_JOINED.sub(", ", text)))
    between = re.search(rf"\d.*{_WORD.pattern}.*\d", spoken, re.DOTALL)
    return bool(between or (_WORD.search(spoken) and re.search(r"\d\s*,\s+[^,]*\d", spoken)))


def _words(text: str) -> list[str]:
    return _WORD.findall(_spoken(text))


def _spoken(text: str) -> str:
    """Text without commands, and without the braces of those that set words; a unit is a word."""
    return _COMMAND.sub(" ", _TEXT.sub(r" \1 ", _LONE.sub(r"\1\2\2", text)))


def _plain(text: str) -> str:
    """Thousands joined, one kind of minus, no currency but bare dollars, mixed numbers as fractions."""
    text = re.sub(
        rf"(?<![\d.,^_])\d{{1,3}}(?:(?:{LATEX_COMMA}| )\d{{3}})+(?!\d)",
        lambda match: re.sub(r"\D", "", match[0]),
        text,
    )
    text = re.sub(rf"(?<![\w)\]}}])[{MINUS}](?=[\d.\\{CURRENCY}])|\u2212", "-", text)
    others = CURRENCY.replace("$", "")
    text = re.sub(rf"(?:\\\$|[{others}])[ ~]?(?=[-\d.])|(?<=\d)[ ~]?(?:\\\$|[{others}])", "", text)
    text = re.sub(r"(?<![\w)\]}])-\$(?=\d[^$]*$)", "$-", text)
    text = re.sub(r"(?<![\d.^_])(?<![\^_]\{)(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<=\d)\s*\*?\s*pi(?![A-Za-z])", r"\\pi", text)
    return re.sub(r"(?<![A-Za-z\\])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)


def _delimited(text: str) -> str:
    """Dollars around a formula with a LaTeX command after which no number follows.

    Only if the text has no delimiters and no box, from which math_verify reads rather.
    """
    if _DELIMITER.search(text) or _BOX.search(text):
        return text
    *_, last = [None, *(match for match in _FORMULA.finditer(text) if _COMMAND.search(match[0]))]
    if last is None or re.search(r"\d", text[last.end() :]):
        return text
    return f"{text[: last.start()]}${last[0]}${text[last.end() :]}"


def _boxes(text: str) -> list[str]:
    """The contents of all boxes that are closed."""
    ends = ((match.end(), _closing(text, match.end())) for match in _BOX.finditer(text))
    return [text[start:end] for start, end in ends if end is not None]


def _open_box(text: str) -> bool:
    """Whether the text ends inside its last box."""
    *_, last = [None, *(match.end() for match in _BOX.finditer(text))]
    return last is not None and _closing(text, last) is None


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` is closed; None if it is not."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return match.start()
    return None
