"""The entry point: the commands, and what a rejected input, a full disk or Ctrl-C ends with."""

import inspect
import sys

import typer

from funcprobe.types import InputError

from .commands import preparing
from .commands.app import app
from .commands.comparing import compare, sweep
from .commands.looking import report
from .commands.probing import check, run, whatif
from .machine.allocator import keep_freed_memory

INTERRUPTED = 130  # 128 + SIGINT, as in shells

# In the order in which --help lists them.
COMMANDS = (run, whatif, sweep, compare, report, check, preparing.init, preparing.inspect)

for command in COMMANDS:
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(text.split()) for text in paragraphs))(command)


def main() -> None:
    """Entry point. A rejected input gives one line on stderr and exit status 2."""
    keep_freed_memory()
    try:
        app(prog_name="funcprobe")
    except InputError as error:
        _fail(str(error))
    except OSError as error:  # an unwritable folder, a full disk
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; no incomplete file was left")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's, on KeyboardInterrupt
            typer.echo(
                "funcprobe: interrupted; finished stages are stored, no incomplete file was left",
                err=True,
            )
        raise


def _fail(message: str) -> None:
    typer.echo("funcprobe: " + " ".join(message.split()), err=True)
    sys.exit(2)
