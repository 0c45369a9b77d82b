"""A run's folder and stored stages, held while it goes on; bounded at its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import store
from ..config.schema import Config
from ..console import Narrator
from ..machine.home import expanded
from ..machine.ranks import ONE_PROCESS, World
from ..store import Stages


def run_folder(config: Config) -> Path:
    """The folder to which a run of this configuration is written."""
    return expanded(config.run.folder) / config.run.name


def stages_of(config: Config, narrator: Narrator, world: World = ONE_PROCESS) -> Stages:
    """What runs beside this one's folder stored."""
    folder = run_folder(config)
    return Stages(folder.parent / store.FOLDER, world=world, say=narrator.say, run=folder.name)


@contextmanager
def holding(
    config: Config, narrator: Narrator, world: World = ONE_PROCESS, *, fresh: bool = False
) -> Iterator[Stages]:
    """The stages of a run, while no other process runs under its name.

    At the end the cache is bounded as the configuration says. InputError for a folder that cannot be
    written, and if another process goes on with it.
    """
    folder = run_folder(config)
    if world.first:
        store.require_writable(folder)
    with store.lease(folder, narrator.say, world) as lease:
        yield stages_of(config, narrator, world)._replace(fresh=fresh, lease=lease)
        if world.first:
            limits = config.run
            cache = folder.parent / store.FOLDER
            store.bound(cache, limits.cache_size, limits.cache_days, narrator.say)
