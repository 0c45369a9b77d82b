"""A run folder to each program of log.to: rejected early if that cannot be, whole if it fails late."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from funcprobe.types import InputError

from ..checkpoint.trainer_state import trained_steps
from ..config.file import read_config
from ..config.log import LogConfig, SinkName
from ..console import Narrator
from ..machine.home import expanded
from ..results.saved import load_run
from . import tensorboard, trackio, wandb
from .logged import Logged, logged


class Write(Protocol):
    """Logs a run, and says where it can be seen."""

    def __call__(self, run: Logged, folder: Path) -> str: ...


class Prepare(Protocol):
    """Raises, before a run starts, what would only be found at its end."""

    def __call__(self) -> None: ...


class Sink(NamedTuple):
    """A program that runs are logged to."""

    package: str  # as it is imported
    prepare: Prepare
    write: Write


SINKS: dict[SinkName, Sink] = {
    "tensorboard": Sink("tensorboard", tensorboard.prepare, tensorboard.write),
    "wandb": Sink("wandb", wandb.prepare, wandb.write),
    "trackio": Sink("trackio", trackio.prepare, trackio.write),
}


def require(log: LogConfig) -> None:
    """InputError unless every program of log.to is installed and can be logged to."""
    for name in dict.fromkeys(log.to):
        if find_spec(SINKS[name].package) is None:
            raise InputError(
                f'log.to has "{name}", which is not installed: pip install "funcprobe[{name}]", or '
                f"leave it out"
            )
        with _one_line(f'log.to has "{name}", which cannot be logged to'):
            SINKS[name].prepare()


def send(folder: Path, narrator: Narrator) -> None:
    """Log a run folder as its own configuration says; InputError, one line, names what failed.

    The folder is not changed, but for TensorBoard's in it. One program's failure keeps none of the
    others from its log.
    """
    config = read_config(folder / "config.toml")
    names = dict.fromkeys(config.log.to)
    if not names:
        return
    with narrator.phase("log"):
        step = trained_steps(Path(config.policy.checkpoint))
        run, failed = logged(load_run(folder), config, step), []
        events = expanded(config.log.folder) if config.log.folder else folder / "tensorboard"
        for name in names:
            try:
                with _one_line(name):
                    where = SINKS[name].write(run, events)
            except InputError as error:
                failed.append(str(error))
            else:
                narrator.say(f"logged to {name}: {where}")
    if failed:
        again = f"funcprobe run {shlex.quote(str(folder / 'config.toml'))}"
        raise InputError(
            f"the run is whole in {folder}, but was not logged: {'; '.join(failed)}; {again} logs it "
            "again, from stored stages"
        )


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever a program raises, as InputError: their errors have no common type."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{what}: {reason or type(error).__name__}") from error
