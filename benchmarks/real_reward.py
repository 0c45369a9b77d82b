"""The graded reward of the real policy's sums, for TRL and funcprobe alike."""

import math
import re
from typing import Any


def closeness(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """exp(-|d| / 5), d the distance of the last number of a completion from the answer; 0 without one.

    Of 0 and 1 alone this model learns nothing: too few of its sums are right.
    """
    return [_closeness(_text(c), int(a)) for c, a in zip(completions, answer, strict=True)]


def _text(completion: Any) -> str:
    """TRL gives messages for prompts that are messages."""
    return str(completion if isinstance(completion, str) else completion[-1]["content"])


def _closeness(text: str, answer: int) -> float:
    # ASCII digits of a length that int() takes; other numerals are no answer here.
    found = re.findall(r"[0-9]{1,9}", text)
    return math.exp(-abs(int(found[-1]) - answer) / 5) if found else 0.0
