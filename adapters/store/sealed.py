"""Tensors in one file that says what they are, with a checksum over all of it.

A safetensors file whose metadata has the SHA-256 of the whole file, computed with zeros in the place of
the checksum itself; in one entry, of JSON, since several are written in random order. What is read is
verified before any of it is parsed: a file that was damaged, cut off, or renamed to another's name is
`Damaged`, and its reader computes again.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .whole import write_whole

HEAD = 8  # bytes of the header's length, with which every safetensors file begins
LONGEST = 2**20  # bytes of a header that `about` reads
ENTRY = "funcprobe"
_NONE = "0" * 64
_SUM = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')


class Damaged(ValueError):  # noqa: N818 an answer, beside which nothing went wrong
    """Why a sealed file is not what it should be, as the end of a sentence."""


def seal(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """The file's content; `about` is in its metadata, and under the checksum."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = bytearray(save(whole, {ENTRY: json.dumps({**about, "sha256": _NONE}, sort_keys=True)}))
    found = _SUM.search(data)
    assert found is not None
    data[slice(*found.span(1))] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def unseal(data: bytes, about: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that were sealed with these `about`; Damaged for anything else."""
    length = int.from_bytes(data[:HEAD], "little")
    head = data[: HEAD + length]
    found = _SUM.search(head)
    if len(data) <= HEAD or found is None:
        raise Damaged("has no checksum: it is cut off, or of another program")
    start, end = found.span(1)
    computed = hashlib.sha256(head[:start])
    computed.update(_NONE.encode())
    computed.update(memoryview(data)[end:])
    if computed.hexdigest().encode() != found[1]:
        raise Damaged("is damaged: its checksum is another")
    try:
        tensors: dict[str, Tensor] = load(data)
        metadata = _metadata(head[HEAD:])
    except (
        SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        AssertionError,
        RuntimeError,
        AttributeError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise Damaged(f"is no safetensors file ({reason})") from error
    other = next((name for name, value in about.items() if metadata.get(name) != value), None)
    if other is not None:
        raise Damaged(f"is another file under this name: its {other} is {metadata.get(other)!r:.80}")
    return tensors


def write_sealed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """`seal` as a file that appears, or is replaced, only when complete."""
    data = seal(tensors, about)
    write_whole(path, lambda target: target.write_bytes(data))


def read_sealed(path: Path, about: Mapping[str, str]) -> dict[str, Tensor] | None:
    """`unseal` of a file; None without one. Damaged also for one that cannot be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from error
    return unseal(data, about)


def about(path: Path) -> dict[str, str]:
    """The metadata of a sealed file, unverified and for display alone; empty if there is none."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(HEAD), "little")
            return _metadata(stream.read(min(length, LONGEST)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _metadata(header: bytes) -> dict[str, str]:
    try:
        found = json.loads(json.loads(header)["__metadata__"][ENTRY])
    except RecursionError as error:
        raise ValueError(str(error)) from error
    return {str(name): str(value) for name, value in found.items()}
