"""Sentences that a terminal prints, with their numbers as the page writes numbers."""

import re
from decimal import Decimal

from markupsafe import Markup, escape

from .numbers import LARGEST, MINUS, SMALLEST
from .visible import visible

# What is quoted is another's text, and stays as it is. An apostrophe within a word opens no quotation.
_PIECE = re.compile(
    r"""(?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*\""""
    r"|(?<![\w.:=+/-])(?P<sign>[+-]?)(?P<digits>\d+(?:\.\d+)?)(?:e(?P<power>[+-]?\d+))?(?![\w/-]|\.\d)"
)
_MOST = 400  # beyond it no float has a power


def typeset(text: str) -> Markup:
    """-5.9e-03 as −0.0059, 1.2e-10 as 1.2 × 10 to the −10; the rest visible and escaped."""
    if isinstance(text, Markup):
        return text
    found, end = Markup(""), 0
    for piece in _PIECE.finditer(text):
        found += escape(visible(text[end : piece.start()])) + _shown(piece)
        end = piece.end()
    return found + escape(visible(text[end:]))


def _shown(piece: re.Match[str]) -> Markup:
    if piece["digits"] is None:
        return escape(visible(piece.group()))
    sign = MINUS if piece["sign"] == "-" else piece["sign"]
    digits, power = piece["digits"], int(piece["power"] or 0)
    if piece["power"] is None:
        return escape(sign + digits)
    if not float(digits):
        return Markup("0")
    if abs(power) < _MOST and SMALLEST <= abs(float(f"{digits}e{power}")) < LARGEST:
        return escape(sign + format(Decimal(f"{digits}e{power}"), "f"))
    return Markup("{}{}\u00a0×\u00a010<sup>{}</sup>").format(
        sign, digits, str(power).replace("-", MINUS)
    )
