"""Stored results of stages: computed once for the same inputs."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

from funcprobe.types import InputError

from ..machine.ranks import ONE_PROCESS, World
from .fingerprints import fingerprint
from .leases import LOCKS, Lease
from .locks import held
from .sealed import Damaged, read_sealed, write_sealed

T = TypeVar("T")
Report: TypeAlias = Callable[[bool], None]
"""Called with whether a result was stored by an earlier run."""

FILE = "file"  # the name of the tensor that holds the bytes of a stage that is a file


def _ignore(_: object) -> None: ...


def _anything(_: object) -> bool:
    return True


class Place(NamedTuple):
    """Where a result is stored, and what is under its checksum."""

    path: Path
    about: dict[str, str]

    @property
    def lock(self) -> Path:
        return self.path.parent / LOCKS / f"{self.path.stem}.lock"


class Stages(NamedTuple):
    """Results of stages, one file each, named by the hash of all their inputs.

    A file appears under its name only when complete, so that an interrupted run loses at most one
    stage. Each has a checksum: one that is damaged, or does not have the tensors that are expected, is
    computed again, and `say` has a line. Another run that needs the same one waits for the run that
    computes it. Without a folder nothing is stored. Of several processes all ask, the first one reads
    and writes, and all compute what is not there.
    """

    folder: Path | None
    fresh: bool = False  # compute every result again, also if stored
    writes: bool = True  # else what is stored is read alone
    world: World = ONE_PROCESS
    say: Callable[[str], None] = _ignore  # one line each
    run: str = ""  # whose results these are, for who lists them
    lease: Lease | None = None  # the run's, which says what it uses

    def tensors(
        self,
        stage: str,
        inputs: Any,
        like: Any,
        compute: Callable[[], Any],
        report: Report = _ignore,
        fits: Callable[[Any], bool] = _anything,
    ) -> Any:
        """compute(), a tree of tensors with the structure of `like`, or its stored result.

        A stored tensor is finite, with the shape and dtype of its leaf in `like`, unless that has no
        entries; a tree of which `fits` is false is computed again as well. A result that is not finite
        is not stored.
        """
        where = self._where(stage, inputs)
        with self._alone(where):
            stored = self._stored(where, like, fits)
            report(stored is not None)
            if stored is not None:
                return stored
            value = compute()
            if all(bool(leaf.isfinite().all()) for leaf in optree.tree_leaves(value)):
                self._write(where, _named(optree.tree_leaves(value)))
            return value

    def stored(self, stage: str, inputs: Any, like: Any) -> Any:
        """What `tensors` would read; None without it."""
        return self._stored(self._where(stage, inputs), like)

    def recall(self, stage: str, inputs: Any) -> Any:
        """The JSON value that `remember` stored; None without one."""
        content = self._content(self._where(stage, inputs))
        try:
            return None if content is None else json.loads(content)
        except (ValueError, RecursionError):
            return None

    def remember(self, stage: str, inputs: Any, value: Any) -> None:
        """Store a JSON value, in place of an earlier one."""
        if self.writes:
            content = json.dumps(value, allow_nan=False).encode()
            self._write(self._where(stage, inputs), _of_bytes(content))

    def file(
        self,
        stage: str,
        inputs: Any,
        suffix: str,
        compute: Callable[[Path], None],
        read: Callable[[Path], T],
        report: Report = _ignore,
    ) -> T:
        """read(path) of a file that compute(path) writes, if it is not stored.

        An InputError of `read` about what is stored says that it is not as expected: it is computed
        again. Of several processes each has a copy of its own, and calls compute for it.
        """
        where = self._where(stage, inputs)
        with (
            self._alone(where),
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        ):
            own, found = Path(scratch) / f"{stage}.{suffix}", self._content(where)
            if found is not None:
                own.write_bytes(found)
                try:
                    value = read(own)
                except InputError as error:
                    self._say_damaged(where, f"is not as expected: {error}")
                else:
                    report(True)
                    return value
            report(False)
            compute(own)
            if where is not None:
                self._write(where, _of_bytes(own.read_bytes()))
            return read(own)

    def place(self, stage: str, inputs: Any) -> Place:
        """Where this result is, or will be."""
        assert self.folder is not None
        key = fingerprint(inputs)
        return Place(self.folder / f"{stage}-{key[:20]}.safetensors", {"stage": stage, "key": key})

    def _where(self, stage: str, inputs: Any) -> Place | None:
        """For the one process that reads and writes; inputs are hashed once for all it does."""
        own = self.folder is not None and self.world.first
        return self.place(stage, inputs) if own else None

    @contextmanager
    def _alone(self, where: Place | None) -> Iterator[None]:
        """While no other run computes, or reads, this result; a run that is killed lets go of it."""
        with ExitStack() as stack:

            def hold() -> None:
                if where is not None and self.writes:
                    what = f"stage {where.path.stem}"
                    stack.enter_context(held(where.lock, what, self.say))

            self.world.on_first(hold)
            yield

    def _stored(self, where: Place | None, like: Any, fits: Callable[[Any], bool] = _anything) -> Any:
        def tree(found: dict[str, Tensor]) -> Any:
            leaves = [found[key] for key in sorted(found)]
            return optree.tree_unflatten(optree.tree_structure(like), leaves)

        def require(found: dict[str, Tensor]) -> None:
            _require_like(found, like)
            if not fits(tree(found)):
                raise Damaged("does not hold what is expected")

        found = None if self.folder is None else self.world.on_first(lambda: self._read(where, require))
        return None if found is None else tree(found)

    def _content(self, where: Place | None) -> bytes | None:
        def find() -> bytes | None:
            found = self._read(where, _require_file)
            return None if found is None else found[FILE].numpy().tobytes()

        return None if self.folder is None else self.world.on_first(find)

    def _read(
        self, where: Place | None, require: Callable[[dict[str, Tensor]], None]
    ) -> dict[str, Tensor] | None:
        """Of the first process: what is stored and as expected."""
        if where is None or self.fresh:
            return None
        self._use(where)
        try:
            found = read_sealed(where.path, where.about)
            if found is not None:
                require(found)
        except Damaged as error:
            self._say_damaged(where, str(error))
            return None
        if found is not None:
            with suppress(OSError):  # a folder that is read alone
                os.utime(where.path)  # its last use
        return found

    def _write(self, where: Place | None, tensors: dict[str, Tensor]) -> None:
        if where is not None:
            self._use(where)
            write_sealed(where.path, tensors, where.about | {"run": self.run})

    def _use(self, where: Place) -> None:
        if self.lease is not None and self.writes:
            self.lease.use(where.path)

    def _say_damaged(self, where: Place | None, reason: str) -> None:
        if where is not None:
            self.say(f"warning: stored stage {where.path} {reason}; it is computed again")


def _named(leaves: list[Tensor]) -> dict[str, Tensor]:
    return {f"{i:06d}": leaf for i, leaf in enumerate(leaves)}


def _require_like(found: dict[str, Tensor], like: Any) -> None:
    expected = _named(optree.tree_leaves(like))
    if found.keys() != expected.keys():
        raise Damaged(f"has {len(found)} tensors, {len(expected)} are expected")
    for name, leaf in expected.items():
        one = found[name]
        if leaf.numel() and (one.shape != leaf.shape or one.dtype != leaf.dtype):
            raise Damaged(
                f"has a tensor of {one.dtype} {tuple(one.shape)}, {leaf.dtype} {tuple(leaf.shape)} is "
                "expected"
            )
        if not bool(one.isfinite().all()):
            raise Damaged("has numbers that are not finite")


def _of_bytes(content: bytes) -> dict[str, Tensor]:
    return {FILE: torch.frombuffer(bytearray(content), dtype=torch.uint8)}


def _require_file(found: dict[str, Tensor]) -> None:
    if found.keys() != {FILE} or found[FILE].dtype != torch.uint8:
        raise Damaged("holds no file")
