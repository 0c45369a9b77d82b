"""A tokenizer's chat template, rendered: a stranger's program, in jinja's sandbox and in bounds.

transformers compiles it in jinja's immutable sandbox, which gives it no attributes of Python's own and
no files. It bounds neither time nor memory, which is done here.
"""

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2
from jinja2.exceptions import TemplateError

LONGEST = 10.0  # seconds
MOST_STEPS = 1_000_000  # lines of a template, and calls; a long conversation takes some thousands
MEMORY = 512 << 20  # bytes
_TEMPLATE = "<template>"  # jinja's name of the code of a template

# What a template raises: by its own choice, for a type that it does not expect, an argument of
# the tokenizer's own, two arguments that exclude each other, a bound.
UNRENDERABLE = (
    *(TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError),
    *(ArithmeticError, RecursionError),
)


class _BeyondError(BaseException):
    """No Exception: jinja computes constants when it compiles, and goes on after any of these."""


def rendered(tokenizer: Any, messages: Any, **arguments: Any) -> Any:
    """tokenizer.apply_chat_template; raises one of UNRENDERABLE, also for a template beyond a bound.

    Counted are calls in this thread, and lines of the template; limited are time and memory.
    """
    _require_no_powers(tokenizer.chat_template)
    end, steps, running = time.monotonic() + LONGEST, 0, True

    def stop() -> None:
        # In a callback, as of the garbage collector, it would only end the tracing: the alarm goes on.
        if running:
            raise _BeyondError

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps > MOST_STEPS or time.monotonic() > end:
            stop()

    def line(_frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            count()
        return line

    def call(frame: FrameType, _event: str, _argument: Any) -> Any:
        count()
        return line if frame.f_code.co_filename == _TEMPLATE else None

    before = sys.gettrace()
    with _limited_memory(), _alarm(stop):
        sys.settrace(call)
        try:
            return tokenizer.apply_chat_template(messages, **arguments)
        except _BeyondError as error:
            running = False
            raise TemplateError(f"it takes more than {MOST_STEPS:,} steps or {LONGEST:g} s") from error
        except MemoryError as error:
            raise TemplateError(f"it takes more than {MEMORY >> 20} MiB") from error
        finally:
            running = False
            sys.settrace(before)


def _require_no_powers(template: Any) -> None:
    """A power of whole numbers is one operation, which nothing can interrupt."""
    texts = template.values() if isinstance(template, dict) else [template]
    for text in texts:
        if not isinstance(text, str) or "**" not in text:
            continue
        tokens = jinja2.Environment().lex(text)
        if any(kind == "operator" and value == "**" for _, kind, value in tokens):
            raise TemplateError("it has the operator **, which chat templates have no use for")


@contextmanager
def _alarm(stop: Callable[[], None]) -> Iterator[None]:
    """Calls it after LONGEST, and then ten times a second: a filter of jinja's has no counted lines.

    In the main thread, which alone receives signals. An alarm of the caller's own is set again.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, lambda *_: stop())
    left, every = signal.setitimer(signal.ITIMER_REAL, LONGEST, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), every)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """At most MEMORY more of address space, where the system has limits and no GPU shares it."""
    try:
        import resource
        from pathlib import Path

        found = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    except (ImportError, OSError):
        found = None
    torch = sys.modules.get("torch")
    if found is None or (torch is not None and torch.cuda.is_initialized()):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(found[1]) * 1024 + MEMORY
    lower = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
