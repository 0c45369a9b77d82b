"""What a stage has so far, stored as it goes: an interrupted one goes on from there, to the same bits.

A stage is one pass after another; each has a file, which is written over while it runs, and all are
deleted when the stage is stored. What writing takes is bounded, and so is what an interruption loses:
what was computed since the last write.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from funcprobe.progress import Kept, SoFar
from funcprobe.types import InputError

from .machine.cost import Stage
from .store import Stages, write_whole
from .store.sealed import ENTRY

T = TypeVar("T")

EVERY = 1.0  # seconds between two writes, at least
SHARE = 0.05  # of the time, at most, that writes take: of large gradients, they are rarer
SUFFIX = "progress.safetensors"
NAME = "{:06d}"  # of a tensor in the file


@contextmanager
def resumable(
    stages: Stages, name: str, inputs: Any, stage: Stage, parts: str = "microbatches"
) -> Iterator[Stage]:
    """The stage with a progress in which the passes within the block keep what they have.

    `name` and `inputs` are those under which the result is stored by the end of the block; then what
    was kept of it is deleted. After an interruption the same passes get it, and a line says how much.
    With several processes each has its own. Nothing is kept without a folder of stages.
    """
    if stages.folder is None or not stages.writes:
        yield stage
        return
    own = _Stored(stages, stages.folder, (name, inputs), stage, parts)
    yield stage._replace(progress=own, advance=own.advance)
    if stages.world.size > 1:  # the first one has stored the result before any forgets its part
        stages.world.gathered(None)
    own.forget()


def computed(
    stages: Stages,
    name: str,
    inputs: Any,
    like: T,
    compute: Callable[[Stage], T],
    stage: Stage,
    parts: str = "microbatches",
    fits: Callable[[T], bool] = lambda _: True,
) -> T:
    """compute(stage), or its stored result, as `Stages.tensors`; the stage given to it is resumable."""
    with resumable(stages, name, inputs, stage, parts) as own:
        found: T = stages.tensors(name, inputs, like, lambda: compute(own), stage.found, fits)
    return found


class _File(NamedTuple):
    """What is kept of one pass."""

    so_far: SoFar
    parts: int
    sequences: int


class _Pass:
    """`Kept`, of one pass."""

    def __init__(self, path: Path, about: dict[str, str], found: _File | None) -> None:
        self.path, self.about = path, about
        self.so_far = None if found is None else found.so_far
        self.parts = 0 if found is None else found.parts
        self.sequences = 0 if found is None else found.sequences
        self.latest: tuple[tuple[int, ...], Callable[[], Sequence[Tensor]]] | None = None
        self.write: Callable[[], None] = lambda: None

    def keep(self, counts: Sequence[int], tensors: Callable[[], Sequence[Tensor]]) -> None:
        self.parts += 1
        self.latest = (tuple(counts), tensors)
        self.write()

    def settle(self) -> None:
        """Off the device, since the pass is at its end."""
        if self.latest is not None:
            counts, tensors = self.latest
            there = _on_cpu(tensors())
            self.latest = (counts, lambda: there)


class _Stored:
    """`Progress`, in files of a stage."""

    def __init__(
        self, stages: Stages, folder: Path, result: tuple[str, Any], stage: Stage, parts: str
    ) -> None:
        self.stages, self.folder, self.result = stages, folder, result
        self.stage, self.words = stage, parts
        self.stem = ""  # of the files, once it is known: to hash the inputs may take a while
        self.about: dict[str, str] = {}
        self.passes: list[_Pass] = []
        self.reused = (0, 0)  # parts, sequences
        self.said = False
        self.works = True
        self.cost = 0.0  # seconds of the last write
        self.last = time.monotonic()

    def begin(self, plan: Sequence[int], fits: Callable[[SoFar], bool]) -> Kept:
        if not self.stem:
            self._place()
            if self.stages.fresh:
                self._delete()
        if self.passes:
            self.passes[-1].settle()
        path = self.folder / f"{self.stem}{len(self.passes):03d}.{SUFFIX}"
        digest = hashlib.sha256(json.dumps(list(plan)).encode()).hexdigest()
        about = {**self.about, "plan": digest}
        own = _Pass(path, about, self._found(path, about, fits))
        own.write = self._write_if_due
        self.passes.append(own)
        self.reused = (self.reused[0] + own.parts, self.reused[1] + own.sequences)
        self.stage.advance(own.sequences)
        return own

    def advance(self, sequences: int) -> None:
        if self.passes:
            self.passes[-1].sequences += sequences
        self.stage.advance(sequences)

    def forget(self) -> None:
        """The stage is stored."""
        self._say_reused()
        if not self.stem:
            if not any(self.folder.glob(f"{self.result[0]}-*.{SUFFIX}")):
                return  # found in the store, without anything left of it
            self._place()
        self._delete()

    def _place(self) -> None:
        world, place = self.stages.world, self.stages.place(*self.result)
        rank = f".{world.rank}of{world.size}" if world.size > 1 else ""
        self.stem, self.about = f"{place.path.stem}{rank}.", place.about | {"run": self.stages.run}

    def _delete(self) -> None:
        for path in self.folder.glob(f"{self.stem}*.{SUFFIX}"):
            path.unlink(missing_ok=True)

    def _found(self, path: Path, about: dict[str, str], fits: Callable[[SoFar], bool]) -> _File | None:
        if not path.is_file():
            return None
        try:
            return _read(path, about, fits)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            why = " ".join(str(error).split())[:100]
            self.stage.say(f"{path}, of an interrupted run, is discarded: {why}")
            for later in self.folder.glob(f"{self.stem}*.{SUFFIX}"):  # which may depend on it
                if later.name >= path.name:
                    later.unlink(missing_ok=True)
            return None

    def _write_if_due(self) -> None:
        self._say_reused()
        if not self.works or time.monotonic() - self.last < max(EVERY, self.cost / SHARE):
            return
        try:
            for one in self.passes:
                if one.latest is not None:
                    counts, tensors = one.latest
                    there = _on_cpu(tensors())  # a GPU computes until here, which is no cost
                    start = time.monotonic()
                    _write(one, counts, there)
                    self.cost, one.latest = time.monotonic() - start, None
        except (OSError, InputError) as error:
            self.works = False
            self.stage.say(f"warning: the progress of this stage is not kept: {error}")
        self.last = time.monotonic()

    def _say_reused(self) -> None:
        parts, sequences = self.reused
        if parts and not self.said:
            self.said = True
            of = "" if self.stage.total is None else f" of {self.stage.total}"
            many = f"{parts} {self.words} ({sequences}{of} sequences)"
            if self.words == "responses":  # one sequence each
                many = f"{sequences}{of} responses"
            self.stage.say(f"{self.stage.cost.stage}: {many} from an interrupted run")


def _on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().cpu().contiguous() for x in tensors]


def _write(one: _Pass, counts: tuple[int, ...], tensors: list[Tensor]) -> None:
    """Without a copy of the tensors, which may be as large as the model."""
    numbers = [one.parts, one.sequences, *counts]
    whole = [torch.tensor(numbers), *tensors]
    about = {**one.about, "crc32": _checksum(whole)}
    named = {NAME.format(i): x for i, x in enumerate(whole)}
    metadata = {ENTRY: json.dumps(about, sort_keys=True)}
    write_whole(one.path, lambda target: save_file(named, target, metadata))


def _read(path: Path, about: dict[str, str], fits: Callable[[SoFar], bool]) -> _File:
    """ValueError, and others of its kind, for a file that is damaged or of another plan."""
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()[ENTRY])
        names = [NAME.format(i) for i in range(len(file.keys()))]
        if sorted(file.keys()) != names:
            raise ValueError("its tensors have other names")
        whole = [file.get_tensor(name).clone() for name in names]
    if found["crc32"] != _checksum(whole):
        raise ValueError("it is damaged")
    for name in ("stage", "key", "plan"):
        if found[name] != about[name]:
            raise ValueError(f"it is of another {name}")
    numbers, *tensors = whole
    if numbers.dtype != torch.int64 or numbers.dim() != 1 or bool((numbers < 0).any()):
        raise ValueError("its counts are none")
    if not all(bool(x.isfinite().all()) for x in tensors):
        raise ValueError("it has numbers that are not finite")
    parts, sequences, *counts = numbers.tolist()
    so_far = SoFar(tuple(counts), tensors)
    if not fits(so_far):
        raise ValueError("it has other contents than this pass makes")
    return _File(so_far, parts, sequences)


def _checksum(tensors: Sequence[Tensor]) -> str:
    found = 0
    for x in tensors:
        found = zlib.crc32(f"{x.dtype}{list(x.shape)}".encode(), found)
        found = zlib.crc32(x.flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
