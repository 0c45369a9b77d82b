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


def test_a_log_file_has_a_line_every_half_minute_and_one_at_the_end_of_a_stage(monkeypatch):
    clock = iter([0.0, 29.0, 31.0, 60.0, 61.0, 93.0, 94.0, 100.0, 100.5, 200.0, 212.0])
    monkeypatch.setattr("funcprobe.adapters.console.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    narrator = Narrator(Console(file=stream, highlight=False, width=200))
    with narrator.phase("measure", 10) as stage:
        for _ in range(5):  # at 29, 31, 60, 61, 93 s
            stage.advance(2)
    with narrator.phase("load"):  # half a second, of no number of sequences
        pass
    with narrator.phase("import"):
        pass
    assert stream.getvalue().splitlines() == [
        "measure: 4 of 10 sequences, 31 s, about 46 s left",
        "measure: 8 of 10 sequences, 61 s, about 15 s left",
        "measure: 10 of 10 sequences, 93 s",
        "measure: 94.0 s",
        "import: 12.0 s",
    ]
    assert narrator.lines == ["measure: 94.0 s", "load: 0.5 s", "import: 12.0 s"]


def test_a_terminal_has_the_bar_instead():
    stream = io.StringIO()
    narrator = Narrator(Console(file=stream, force_terminal=True, highlight=False))
    with narrator.phase("measure", 1) as stage:
        stage.advance(1)
    assert "measure: " not in stream.getvalue()
