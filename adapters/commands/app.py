"""What the commands share: the application, options, the console that they print to."""

import os
import sys
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from funcprobe.types import InputError

from ..console import Terminal
from ..machine.launcher import launched

if TYPE_CHECKING:
    from ..machine.ranks import World

ABOUT = (
    "Predicts and measures how the next optimizer step changes the entropy of a policy in RL training: "
    "to first order with a standard error, and by importance sampling, without taking the step."
)
_world: ContextVar["World | None"] = ContextVar("world", default=None)
SHARED = ("run", "whatif", "sweep", "check")  # by the processes that a launcher started
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"funcprobe {metadata.version('funcprobe')}")
        raise typer.Exit


@app.callback(help=ABOUT)
def common(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 its callback has it
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options before a command."""
    _world.set(context.obj)
    if launched() and context.invoked_subcommand not in SHARED:
        raise InputError(
            f"funcprobe {context.invoked_subcommand} is the work of one process: start it without "
            f"torchrun or accelerate launch, which are for {', '.join(SHARED)}"
        )


def world() -> "World":
    """The processes that share this command; without a launcher this one alone."""
    from ..machine.ranks import World  # imports torch

    return _world.get() or World()


ConfigPath = Annotated[
    Path, typer.Argument(metavar="CFG.TOML", help="Configuration file; funcprobe init writes one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the configuration, as in --set sampling.B_E=64. May be repeated.",
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print everything that was found, and every check.")
]


def stdout() -> Console:
    """As wide as the terminal; in a file or a pipe, as wide as the tables."""
    return Terminal(highlight=False, width=None if sys.stdout.isatty() else 120)


def open_page(path: Path) -> None:
    """In the browser; where there is no display, or no browser, a line with the address."""
    address = path.resolve().as_uri()
    headless = sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if headless:
        typer.echo(f"no display here, so no browser was opened; the page is {address}")
    elif typer.launch(address):
        typer.echo(f"no browser could be opened; the page is {address}")
