"""Chat templates in bounds: a stranger's program ends in time, and leaves the caller's alarm."""

import signal
import time
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from funcprobe.adapters.checkpoint import template


class Templated:
    """A tokenizer of which the template alone is asked."""

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: list[dict[str, str]]) -> Any:
        return render_jinja_template([messages], chat_template=self.chat_template)[0][0]


def text_of(chat_template: str) -> Any:
    return template.rendered(Templated(chat_template), [{"role": "user", "content": "1+1="}])


@pytest.mark.parametrize(
    "constant",
    ["[1]|slice(2000000000)|list|length", "('ab ' * 30000000)|wordwrap(1)|length"],
    ids=["many steps", "few and long ones"],
)
def test_a_constant_is_computed_in_bounds_too(constant: str, monkeypatch) -> None:
    """jinja computes it when it compiles, and again after any Exception; no line of it is counted."""
    monkeypatch.setattr(template, "LONGEST", 1.0)
    start = time.monotonic()
    with pytest.raises(TemplateError, match="takes more than"):
        text_of("{{ " + constant + " }}")
    assert time.monotonic() - start < 10  # unbounded more than 20 s


def test_an_alarm_of_the_callers_own_rings() -> None:
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert text_of("{{ messages[0].content }}") == "1+1="
        end = time.monotonic() + 5
        while not rung and time.monotonic() < end:
            time.sleep(0.01)
        assert rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_no_alarm_is_left() -> None:
    text_of("{{ messages[0].content }}")
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
