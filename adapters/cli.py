"""The entry point: the commands, and what a rejected input, a full disk or Ctrl-C ends with."""

import inspect
import sys
from typing import TYPE_CHECKING

import typer

from funcprobe.types import InputError

from .commands import preparing
from .commands.app import app
from .commands.comparing import compare, sweep
from .commands.looking import report
from .commands.probing import check, run, whatif
from .machine.allocator import keep_freed_memory
from .machine.launcher import launched

if TYPE_CHECKING:
    from .machine.ranks import World

INTERRUPTED = 130  # 128 + SIGINT, as in shells

# In the order in which --help lists them.
COMMANDS = (run, whatif, sweep, compare, report, check, preparing.init, preparing.inspect)

for command in COMMANDS:
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(text.split()) for text in paragraphs))(command)


def main() -> None:
    """Entry point. A rejected input gives one line on stderr and exit status 2."""
    keep_freed_memory()
    if launched():
        from .machine.ranks import join  # imports torch.distributed, not needed for one process

        join(_outcome)
    said, status = _outcome()
    if said is not None:
        typer.echo(said, err=True)
    sys.exit(status)


def _outcome(world: "World | None" = None) -> tuple[str | None, int]:
    """What is said at the end, and the exit status."""
    try:
        app(prog_name="funcprobe", obj=world)
    except InputError as error:
        return _line(str(error)), 2
    except OSError as error:  # an unwritable folder, a full disk
        where = f"{error.filename}: " if error.filename else ""
        return _line(f"{where}{error.strerror or error}; no incomplete file was left"), 2
    except SystemExit as end:
        said = None
        if end.code == INTERRUPTED:  # typer's, on KeyboardInterrupt
            said = _line("interrupted; finished stages are stored, no incomplete file was left")
        return said, end.code if isinstance(end.code, int) else int(end.code is not None)
    return None, 0


def _line(message: str) -> str:
    return "funcprobe: " + " ".join(message.split())
