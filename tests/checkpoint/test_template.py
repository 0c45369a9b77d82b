"""Chat templates in bounds: a stranger's program ends in time, and leaves the caller's alarm."""

import gc
import signal
import sys
import time
from collections.abc import Iterator
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


@pytest.fixture
def unbothered() -> Iterator[None]:
    """Without Hypothesis's callback of the garbage collector, in which an exception is reported."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("unbothered")
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


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's")
def test_memory_in_bounds() -> None:
    """More than a process of other tests may have freed and kept."""
    with pytest.raises(TemplateError, match="takes more than 512 MiB"):
        text_of("{{ messages[0].content.ljust(6000000000) }}")


def test_an_exception_that_a_callback_swallows_is_raised_again(monkeypatch) -> None:
    """One in a callback of the garbage collector is reported, has no effect, and ends the tracing."""
    swallowed: list[str] = []
    monkeypatch.setattr(template, "MOST_STEPS", 1000)
    monkeypatch.setattr(template, "LONGEST", 0.3)
    monkeypatch.setattr(sys, "unraisablehook", lambda found: swallowed.append(found.exc_type.__name__))

    def step() -> None: ...

    def callback(_phase: str, _info: dict[str, int]) -> None:
        for _ in range(2000):
            step()

    def apply(_messages: Any) -> None:
        gc.collect()
        end = time.monotonic() + 10
        while time.monotonic() < end:
            step()

    tokenizer = Templated("{{ messages[0].content }}")
    monkeypatch.setattr(tokenizer, "apply_chat_template", apply, raising=False)
    gc.callbacks.append(callback)
    try:
        with pytest.raises(TemplateError, match="takes more than 1,000 steps"):
            template.rendered(tokenizer, [])
    finally:
        gc.callbacks.remove(callback)
    assert "_BeyondError" in swallowed


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
