"""Stored results of stages: computed once for the same inputs."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

from funcprobe.types import InputError

from ..machine.ranks import ONE_PROCESS, World
from .fingerprints import fingerprint
from .sealed import Damaged, read_sealed, write_sealed

T = TypeVar("T")
Report: TypeAlias = Callable[[bool], None]
"""Called with whether a result was stored by an earlier run."""

FILE = "file"  # the name of the tensor that holds the bytes of a stage that is a file


def _ignore(_: object) -> None: ...


class Place(NamedTuple):
    """Where a result is stored, and what is under its checksum."""

    path: Path
    about: dict[str, str]


class Stages(NamedTuple):
    """Results of stages, one file each, named by the hash of all their inputs.

    A file appears under its name only when complete, so that an interrupted run loses at most one
    stage. Each has a checksum: one that is damaged, or does not have the tensors that are expected, is
    computed again, and `say` has a line. Without a folder nothing is stored. Of several processes all
    ask, the first one reads and writes, and all compute what is not there.
    """

    folder: Path | None
    fresh: bool = False  # compute every result again, also if stored
    writes: bool = True  # else what is stored is read alone
    world: World = ONE_PROCESS
    say: Callable[[str], None] = _ignore  # one line each
    run: str = ""  # whose results these are, for who lists them

    def tensors(
        self, stage: str, inputs: Any, like: Any, compute: Callable[[], Any], report: Report = _ignore
    ) -> Any:
        """compute(), a tree of tensors with the structure of `like`, or its stored result.

        A stored tensor has the shape and dtype of its leaf in `like`, unless that has no entries.
        """
        stored = self.stored(stage, inputs, like)
        report(stored is not None)
        if stored is not None:
            return stored
        value = compute()
        self._write(stage, inputs, _named(optree.tree_leaves(value)))
        return value

    def stored(self, stage: str, inputs: Any, like: Any) -> Any:
        """What `tensors` would read; None without it."""

        def find() -> dict[str, Tensor] | None:
            return self._read(stage, inputs, lambda found: _require_like(found, like))

        found = None if self.folder is None else self.world.on_first(find)
        if found is None:
            return None
        return optree.tree_unflatten(optree.tree_structure(like), [found[key] for key in sorted(found)])

    def recall(self, stage: str, inputs: Any) -> Any:
        """The JSON value that `remember` stored; None without one."""

        def find() -> Any:
            found = self._read(stage, inputs, _require_file)
            try:
                return None if found is None else json.loads(_content(found))
            except (ValueError, RecursionError):
                return None

        return None if self.folder is None else self.world.on_first(find)

    def remember(self, stage: str, inputs: Any, value: Any) -> None:
        """Store a JSON value, in place of an earlier one."""
        if self.writes:
            self._write(stage, inputs, _of_bytes(json.dumps(value, allow_nan=False).encode()))

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

        def find() -> bytes | None:
            found = self._read(stage, inputs, _require_file)
            return None if found is None else _content(found)

        found = None if self.folder is None else self.world.on_first(find)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            own = Path(scratch) / f"{stage}.{suffix}"
            if found is not None:
                own.write_bytes(found)
                try:
                    value = read(own)
                except InputError as error:
                    self._say_damaged(self.place(stage, inputs).path, f"is not as expected: {error}")
                else:
                    report(True)
                    return value
            report(False)
            compute(own)
            if self.folder is not None and self.world.first:
                self._write(stage, inputs, _of_bytes(own.read_bytes()))
            return read(own)

    def place(self, stage: str, inputs: Any) -> Place:
        """Where this result is, or will be."""
        assert self.folder is not None
        key = fingerprint(inputs)
        return Place(self.folder / f"{stage}-{key[:20]}.safetensors", {"stage": stage, "key": key})

    def _read(
        self, stage: str, inputs: Any, require: Callable[[dict[str, Tensor]], None]
    ) -> dict[str, Tensor] | None:
        """Of the first process: what is stored and as expected."""
        if self.fresh:
            return None
        path, about = self.place(stage, inputs)
        try:
            found = read_sealed(path, about)
            if found is not None:
                require(found)
        except Damaged as error:
            self._say_damaged(path, str(error))
            return None
        if found is not None:
            with suppress(OSError):  # a folder that is read alone
                os.utime(path)  # its last use
        return found

    def _say_damaged(self, path: Path, reason: str) -> None:
        if self.world.first:
            self.say(f"warning: stored stage {path} {reason}; it is computed again")

    def _write(self, stage: str, inputs: Any, tensors: dict[str, Tensor]) -> None:
        if self.folder is not None and self.world.first:
            path, about = self.place(stage, inputs)
            write_sealed(path, tensors, about | {"run": self.run})


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


def _of_bytes(content: bytes) -> dict[str, Tensor]:
    return {FILE: torch.frombuffer(bytearray(content), dtype=torch.uint8)}


def _require_file(found: dict[str, Tensor]) -> None:
    if found.keys() != {FILE} or found[FILE].dtype != torch.uint8:
        raise Damaged("holds no file")


def _content(found: dict[str, Tensor]) -> bytes:
    return found[FILE].numpy().tobytes()
