"""`funcprobe sweep`: one configuration on every checkpoint of a training, the base loaded once."""

import gc
import glob
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from funcprobe.policy.layout import out_of_memory
from funcprobe.types import InputError

from . import run as probing
from . import sinks
from .checkpoint.resident import Resident
from .checkpoint.toy import ensure_toy_training
from .config.file import to_toml
from .config.schema import Config
from .console import Narrator
from .machine.failures import free, reason_of
from .machine.home import expanded
from .machine.ranks import ONE_PROCESS, World
from .progress import Progress
from .results.manifest import Inputs
from .results.saved import SavedRun, load_run
from .results.schema import Results
from .stages.holding import holding, run_folder

_STEP = re.compile(r"(?:checkpoint-|global_step_)(\d+)")
_OF_CACHE = re.compile(r"^cache_(size|days) = .*\n", re.MULTILINE)  # settings that change no number
# Inputs that belong to one checkpoint.
_OF_ONE = ("optimizer.state", "rollouts.eval", "rollouts.update", "attribution.earlier_checkpoint")
LONGEST = 100  # characters of run.name


class Outcome(NamedTuple):
    """What became of one checkpoint."""

    checkpoint: Path
    folder: Path  # of its run
    reused: bool  # a run of this configuration and these inputs was there
    failed: str | None  # why there is none


def sweep(
    config: Config,
    patterns: Sequence[str],
    narrator: Narrator,
    *,
    fresh: bool = False,
    world: World = ONE_PROCESS,
    together: int = 1,
) -> list[Outcome]:
    """A run of every checkpoint, in RUN.FOLDER/RUN.NAME-<step>, in the natural order of their names.

    A run that is there, with the same configuration and inputs, is kept unless `fresh`. A checkpoint
    that fails, whatever the error, does not stop the others: its outcome has the reason. InputError,
    one line, for what is wrong with all of them: no checkpoint, a configuration of one checkpoint
    alone, two checkpoints of one name.

    Several processes take checkpoints in turn, `together` of them each; the outcomes are the first
    one's to know.
    """
    config, checkpoints = world.on_first(lambda: _with_toy(config, patterns, narrator))
    _require_of_all(config)
    names = _names(config.run.name, checkpoints)
    group = _group(world, together)
    policy_of = Resident()
    outcomes = dict[int, Outcome]()
    if group.first and not world.first:  # which is silent otherwise
        narrator = Narrator(Console(file=sys.__stderr__, force_terminal=False, highlight=False))
    with Progress(narrator, len(checkpoints), world.size // group.size) as progress:
        for i in _taken(world, group, len(checkpoints)):
            own = _own(config, checkpoints[i], names[i])
            outcomes[i] = _outcome(own, checkpoints[i], policy_of, progress, group, i + 1, fresh=fresh)
            gc.collect()  # what a run left in cycles
    found = {i: one for of_rank in world.gathered(outcomes) for i, one in of_rank.items()}
    return [found[i] for i in range(len(checkpoints))]


def _group(world: World, together: int) -> World:
    if world.size % together:
        found = "1 process is" if world.size == 1 else f"{world.size} processes are"
        raise InputError(
            f"--ranks-per-checkpoint {together}: {found} no multiple of it: start such a "
            f"number, as by torchrun --standalone --nproc-per-node {together} -m funcprobe sweep"
        )
    return world if world.size == together else world.in_groups(together)


def _taken(world: World, group: World, count: int) -> Iterator[int]:
    """The checkpoints of a group: each the next that no other group has taken."""
    if group.size == world.size:
        yield from range(count)
        return
    while (i := group.on_first(lambda: world.next_number("checkpoint"))) < count:
        yield i


def _outcome(
    config: Config,
    checkpoint: Path,
    policy_of: Resident,
    progress: Progress,
    group: World,
    number: int,
    *,
    fresh: bool,
) -> Outcome:
    folder = run_folder(config)
    narrator = progress.start(checkpoint.name, number)
    try:
        with holding(config, narrator, group, fresh=fresh) as stages:
            prepared = probing.prepare(config, narrator, stages, policy_of)
            progress.loaded(policy_of.reason)
            plan = prepared.plan
            kept = group.on_first(
                lambda: None if fresh else _kept(folder, plan.config, plan.inputs, config)
            )
            results = kept.results if kept else probing.probe(prepared, narrator)[0]
        if kept is None and group.first:
            sinks.send(folder, narrator)
    except Exception as error:
        if not group.all_arrive(f"failed/{checkpoint}"):
            raise  # of this process alone, for which the others of its group wait
        reason = _reason(error)
        if not isinstance(error, InputError):
            policy_of.forget()  # what state it is in is not known, and memory may be short
        free(error)
        progress.failed(reason)
        return Outcome(checkpoint, folder, False, reason)
    progress.done(_summary(results), reused=kept is not None)
    return Outcome(checkpoint, folder, kept is not None, None)


def _reason(error: Exception) -> str:
    if isinstance(error, InputError | OSError) or out_of_memory(error):
        return reason_of(error, OSError)
    return f"{reason_of(error)} (funcprobe run on this checkpoint alone shows where)"


def _kept(folder: Path, config: Config, inputs: dict[str, Any], asked: Config) -> SavedRun | None:
    """The run in a folder if it has this configuration and these inputs."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        found = load_run(folder)
    except (InputError, OSError):  # of another version, or incomplete: it is replaced
        return None
    before = _OF_CACHE.sub("", found.config)
    if asked.run.max_tokens == "auto":  # another number today changes nothing but rounding
        config = config.model_copy(update={"run": config.run.model_copy(update={"max_tokens": 1})})
        before = re.sub(r"^max_tokens = \d+$", "max_tokens = 1", before, count=1, flags=re.MULTILINE)
    same = before == _OF_CACHE.sub("", to_toml(config)) and found.manifest.inputs == Inputs(**inputs)
    return found if same else None


def _own(config: Config, checkpoint: Path, name: str) -> Config:
    """The configuration of one checkpoint."""
    policy = config.policy.model_copy(update={"checkpoint": str(checkpoint)})
    run = config.run.model_copy(update={"name": name})
    return config.model_copy(update={"policy": policy, "run": run})


def _with_toy(config: Config, patterns: Sequence[str], narrator: Narrator) -> tuple[Config, list[Path]]:
    """The checkpoints; of "toy" those of the built-in policy's training, with its prompts."""
    if list(patterns) == ["toy"]:
        with narrator.phase("make the toy policy and its checkpoints (once)"):
            toy = ensure_toy_training(narrator.say)
        if config.prompts.source == "toy":
            prompts = config.prompts.model_copy(update={"source": str(toy.prompts)})
            config = config.model_copy(update={"prompts": prompts})
        return config, found([str(toy.base.parent / "checkpoint-*")])
    if config.prompts.source == "toy":
        raise InputError(
            'prompts.source is "toy", the sums of the toy policy: set it to the prompts of these '
            "checkpoints, or give --checkpoints toy"
        )
    return config, found(patterns)


def found(patterns: Sequence[str]) -> list[Path]:
    """The folders that match, each once, checkpoint-2 before checkpoint-10. InputError if none does."""
    folders: dict[Path, Path] = {}
    for pattern in patterns:
        matches = [Path(place) for place in glob.glob(str(expanded(pattern)))]
        here = [place for place in matches if place.is_dir()]
        if not here:
            what = f"{len(matches)} files and no folder match" if matches else "nothing matches"
            raise InputError(
                f"--checkpoints {pattern}: {what} in {Path.cwd()}: give checkpoint folders, in quotes, "
                "as 'out/checkpoint-*'"
            )
        for place in here:
            folders.setdefault(place.resolve(), place)
    return sorted(folders.values(), key=_natural)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Numbers by their value, before letters."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _names(name: str, checkpoints: Sequence[Path]) -> list[str]:
    """RUN.NAME-<step>, or with the folder's name. InputError for two of one name."""
    taken: dict[str, Path] = {}
    for path in checkpoints:
        match = _STEP.fullmatch(path.name)
        own = f"{name}-{int(match[1]) if match else re.sub(r'[^a-zA-Z0-9_.-]', '_', path.name)}"
        if len(own) > LONGEST:
            raise InputError(f"{own}: more than {LONGEST} characters: choose a shorter run.name")
        if own in taken:
            raise InputError(
                f"{taken[own]} and {path} would both be written to {own}: give the checkpoints of one "
                "training, and another run.name for those of another"
            )
        taken[own] = path
    return list(taken)


def _require_of_all(config: Config) -> None:
    for key in _OF_ONE:
        section, name = key.split(".")
        if getattr(getattr(config, section), name) is not None:
            raise InputError(
                f"{key} is of one checkpoint, and a sweep goes over several: remove it, or run each "
                "checkpoint by itself"
            )


def _summary(results: Results) -> str:
    """Entropy, and the predicted change by the next step relative to it."""
    entropy = results.entropy
    text = f"entropy {entropy.value:.4g} {entropy.unit}"
    row = next((row for row in results.sweep if row.is_next_lr), None)
    if row is None or not entropy.value:
        return text
    change, interval = row.predicted.value, row.interval_total
    low, mid, high = (f"{100 * x / entropy.value:+.2g}" for x in (interval.low, change, interval.high))
    return f"{text}, next step {mid} % ({low} to {high})"
