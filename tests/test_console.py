"""Text of models and data sets in the log: none of it is obeyed."""

import io

import pytest
from rich.console import Console

from funcprobe.adapters.console import Narrator, excerpt

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",  # clears the screen, sets the title
    "a\r\nwarning: forged line",
    "\u202eright to left\u2066",
    "zero\u200bwidth\u2028line\ufeff",
    "\x9b31m",  # a control sequence in one character
    "\ud800",
    "[bold red]markup[/] :smile: [/nothing]",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_an_excerpt_is_one_harmless_line(text):
    shown = excerpt(text)
    assert shown.isprintable()
    assert eval(shown) == text  # nothing is lost either
    stream = io.StringIO()
    narrator = Narrator(Console(file=stream, force_terminal=True, highlight=False))
    narrator.say(f"response: {shown}")
    assert stream.getvalue() == f"response: {shown}\n"
    assert narrator.lines == [f"response: {shown}"]


def test_an_excerpt_is_bounded_and_keeps_both_ends():
    assert excerpt("道 ok") == "'道 ok'"
    within = ["x", "\n\x00"]
    for text in (*(f"begin {part * 10_000} end" for part in within), "\U000e0001" * 359):
        shown = excerpt(text)
        assert len(shown) <= 240 + 120 + len(" ... ")
        assert " ... " in shown
        if text.startswith("begin"):
            assert shown.startswith("'begin ")
            assert shown.endswith(" end'")
