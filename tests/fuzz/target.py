"""A parser that is fuzzed: what it is given, and how it is called."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Encode = Callable[[Any], bytes]
Read = Callable[[bytes, Path], object]


class Target(NamedTuple):
    """`read(data, folder)` parses the bytes of a file, in an empty folder of its own or a prepared one.

    With `encode` the fuzzer changes structures near the seeds, JSON texts, and encodes them as a file;
    without, it changes the bytes themselves.
    """

    name: str
    read: Read
    seeds: Callable[[], Sequence[bytes]]
    encode: Encode | None = None
    memory: int = 64 << 20  # bytes beside four times the file, declared in docs/security.md

    def file(self, data: bytes) -> bytes:
        """The file's bytes, of those that the fuzzer changes."""
        if self.encode is None:
            return data
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return data
        try:
            return self.encode(value)
        except (ValueError, TypeError, RuntimeError, OverflowError, RecursionError, AttributeError):
            return data  # a structure that no file of this kind has


def pair(
    name: str, read: Read, seeds: Sequence[Any], encode: Encode, *, raw: Encode | None = None
) -> list[Target]:
    """The target of structures, and that of the bytes, NAME:bytes. `raw`: other seeds of the second."""

    @cache
    def texts() -> tuple[bytes, ...]:
        return tuple(json.dumps(seed).encode() for seed in seeds)

    @cache
    def files() -> tuple[bytes, ...]:
        return tuple((raw or encode)(seed) for seed in seeds)

    return [Target(name, read, texts, encode), Target(f"{name}:bytes", read, files)]


def written(folder: Path, name: str, data: bytes) -> Path:
    """A file of these bytes; its folders are made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
