"""The entry point: the commands, and what a rejected input, a full disk or Ctrl-C ends with."""

import inspect
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from funcprobe.types import InputError

from .commands import preparing
from .commands.app import app
from .commands.caching import cache
from .commands.comparing import compare, sweep
from .commands.looking import report
from .commands.probing import check, run, whatif
from .console import one_line
from .machine.allocator import keep_freed_memory
from .machine.ending import UNBROKEN, ended_by_signals, status, words
from .machine.launcher import launched

if TYPE_CHECKING:
    from .machine.ranks import World

INTERRUPTED = 130  # 128 + SIGINT, as in shells

# In the order in which --help lists them.
COMMANDS = (run, whatif, sweep, compare, report, cache, check, preparing.init, preparing.inspect)

for command in COMMANDS:
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(text.split()) for text in paragraphs))(command)


def main() -> None:
    """Entry point. A rejected input gives one line on stderr and exit status 2."""
    keep_freed_memory()
    if launched():
        from .machine.ranks import join  # imports torch.distributed, not needed for one process

        join(_outcome)
    with ended_by_signals():
        said, code = _outcome()
    with suppress(OSError):  # of a terminal that was closed
        if said is not None:
            typer.echo(said, err=True)
    if UNBROKEN.received is not None:
        # Where the interrupt met a text that was executed, as that of a data class, `python -m` of
        # Python 3.11 ends by SIGINT whatever the status, unless another text is executed after it.
        exec("")
    sys.exit(code)


def _outcome(world: "World | None" = None) -> tuple[str | None, int]:
    """What is said at the end, and the exit status."""
    try:
        app(prog_name="funcprobe", obj=world)
    except InputError as error:
        return _line(str(error)), 2
    except OSError as error:  # an unwritable folder, a full disk
        if UNBROKEN.received is not None:  # a terminal that was closed takes no line
            return _ended()
        where = f"{error.filename}: " if error.filename else ""
        return _line(f"{where}{error.strerror or error}; no incomplete file was left"), 2
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return _ended() if code == INTERRUPTED else (None, code)  # typer's, on KeyboardInterrupt
    except KeyboardInterrupt:  # outside of typer
        return _ended()
    return None, 0


def _ended() -> tuple[str, int]:
    received = UNBROKEN.received or signal.SIGINT
    return _line(words(received)), status(received)


def _line(message: str) -> str:
    return "funcprobe: " + one_line(message)
