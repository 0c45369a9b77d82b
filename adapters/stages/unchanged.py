"""Whether the files of a run stay what they were while it reads them, and until it writes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from funcprobe.types import InputError

from .. import store, strict_json
from ..checkpoint.model import Loader
from ..config.schema import Config
from ..console import Narrator
from ..machine.home import expanded
from ..rollouts.files import files_of
from ..store import Stages
from .foreign_code import code_lines
from .plan import Plan, load

Facts: TypeAlias = tuple[int, int, int, int]  # inode, bytes, times of content and of state in ns

DEEPEST = 3  # folders: a sharded optimizer state, or an actor's, is one or two below the checkpoint
# What is read; logs and notes beside it may change.
_READ = {
    *(".json", ".jsonl", ".safetensors", ".bin", ".pt", ".pth", ".distcp", ".parquet", ".csv"),
    *(".model", ".txt", ".jinja"),
}
WAIT = "a trainer may be writing it: wait until it is complete, or give a finished checkpoint"


class Sources(NamedTuple):
    """The files of a run as they were when it had read them."""

    facts: dict[Path, Facts]
    hashes: dict[Path, str]


def loaded(
    config: Config, narrator: Narrator, stages: Stages, policy_of: Loader | None = None
) -> tuple[Plan, Sources]:
    """`plan.load`; InputError if a file of the checkpoint, or another source, changes meanwhile."""
    before = _facts(_files(config))
    try:
        plan = load(config, narrator, policy_of, stages)
    except InputError as error:
        if changed := _changed(before, _facts(_files(config))):
            raise InputError(f"{changed} changed while it was read ({error}): {WAIT}") from error
        raise
    for line in code_lines(config):
        narrator.say(line)
    hashes = {path: found for path in before if (found := _hash(path))}
    after = _facts(_files(config))
    if changed := _changed(before, after):
        raise InputError(f"{changed} changed while it was read: {WAIT}")
    return plan, Sources(after, hashes)


def require_unchanged(sources: Sources, narrator: Narrator) -> None:
    """InputError if the content of a file is another than when it was read.

    A file that is gone has a line: what was read is in memory, and trainers delete old checkpoints.
    """
    now = _facts(list(sources.facts))
    gone = [path for path in sources.facts if path not in now]
    for path, facts in now.items():
        if facts != sources.facts[path] and (found := _hash(path)) != sources.hashes.get(path):
            if found is None:
                gone.append(path)
                continue
            raise InputError(
                f"{path} changed during the run, whose results would be of neither version: nothing is "
                f"written; {WAIT}"
            )
    if gone:
        narrator.say(f"warning: {gone[0]} was deleted during the run, after it had been read")


def _files(config: Config) -> list[Path]:
    """What a run of this configuration reads, as far as it is on this machine."""
    checkpoint = expanded(config.policy.checkpoint)
    places = [checkpoint, *_base(config, checkpoint)]
    places += [expanded(x) for x in (config.optimizer.state, config.prompts.source) if x]
    for _, path in config.rollouts:
        if path is not None and expanded(path).exists():
            places += files_of(expanded(path))
    return [file for place in places for file in ([place] if place.is_file() else _within(place))]


def _base(config: Config, checkpoint: Path) -> list[Path]:
    if config.policy.base is not None:
        return [expanded(config.policy.base)]
    try:
        found = strict_json.parse((checkpoint / "adapter_config.json").read_text("utf-8"), nan=True)
        base = Path(found["base_model_name_or_path"])
        # Any folder can be named there, as the root: one that is no model is not gone through.
        return [base] if (base / "config.json").is_file() else []
    except (OSError, ValueError, KeyError, TypeError):  # which loading refuses, or needs none
        return []


def _within(folder: Path) -> Iterator[Path]:
    """The files of a folder that a run may read; not those of checkpoints below it."""
    for place, folders, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        deeper = depth < DEEPEST
        folders[:] = sorted(n for n in folders if deeper and not n.startswith((".", "checkpoint-")))
        for name in sorted(files):
            if Path(name).suffix in _READ or name == ".metadata":
                yield Path(place) / name


def _facts(files: list[Path]) -> dict[Path, Facts]:
    found = {}
    for path in files:
        try:
            with path.open("rb") as stream:  # a network file system asks its server then
                stat = os.fstat(stream.fileno())
        except OSError:  # gone meanwhile; one that may not be read is refused by its reader
            continue
        found[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found


def _hash(path: Path) -> str | None:
    try:
        return store.fingerprint_path(path)[path.name]
    except (OSError, KeyError):
        return None


def _changed(before: dict[Path, Facts], after: dict[Path, Facts]) -> Path | None:
    """The first file that is new, gone, or another."""
    every = sorted({*before, *after})
    return next((path for path in every if before.get(path) != after.get(path)), None)
