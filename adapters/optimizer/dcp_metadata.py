"""`.metadata` of torch.distributed.checkpoint (DCP): where the chunks of each value are stored.

It is a pickle, and torch's own reader executes any code in it. Here its classes become inert records,
and any other class is rejected.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeAlias

import torch

from funcprobe.types import InputError

from .bounded import require_bounded
from .saved import some

METADATA = ".metadata"
COPY = "copy the whole folder again"

Place: TypeAlias = tuple[str | int, ...]
"""Path of a value in the nested dicts and lists that were saved."""


class Slice(NamedTuple):
    """Bytes of a file: one chunk of a tensor, or an object."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    slice: Slice


class Item(NamedTuple):
    """One saved value: an object where `size` is None, else a tensor of that size in chunks."""

    key: str
    size: tuple[int, ...] | None
    chunks: tuple[Chunk, ...]


def read_index(folder: Path) -> dict[Place, Item]:
    """The values in the folder, by their path in the saved structure; the values are not read.

    Raises InputError if .metadata is missing or damaged, or requests anything but records.
    """
    path = folder / METADATA
    if any(folder.glob(f"__*{METADATA}")):
        raise InputError(
            "has a .metadata file for each process, expected a single one: save with collectives"
        )
    if not path.is_file():
        raise InputError(
            "has no .metadata (a hidden file, written last): the save was interrupted, or the file was "
            f"not copied; {COPY}"
        )
    try:
        metadata = _records(path.read_bytes())
        slices = {
            (at.fqn, tuple(getattr(at, "offset", ()))): _slice(info)
            for at, info in metadata.storage_data.items()
        }
        places = metadata.planner_data or {}
        found = {
            tuple(places.get(key, (key,))): _item(key, saved, slices)
            for key, saved in metadata.state_dict_metadata.items()
        }
        _require_paths(found, len(metadata.state_dict_metadata))
        _require_apart(found.values())
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{METADATA} cannot be read: {error.strerror or error}") from error
    # Raised by pickle for damaged bytes, and for records without the attributes of DCP's.
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError) as error:
        raise InputError(f"{METADATA} is damaged or truncated: {COPY}") from error
    except (AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise InputError(f"{METADATA} is damaged or of another version: {COPY}") from error
    return found


def _slice(info: Any) -> Slice:
    if getattr(info, "transform_descriptors", None):
        raise InputError(
            f"is compressed ({some(info.transform_descriptors)}), which is not supported: save it "
            "without extensions"
        )
    file = str(info.relative_path)
    if PurePath(file).name != file or info.offset < 0 or info.length < 0:
        raise InputError(f"{METADATA} points outside its folder, to {file:.80}: {COPY}")
    return Slice(file, int(info.offset), int(info.length))


def _item(key: str, saved: Any, slices: dict[tuple[str, tuple[int, ...]], Slice]) -> Item:
    if not hasattr(saved, "size"):
        return Item(key, None, (Chunk((), (), slices[key, ()]),))
    chunks = [
        Chunk(tuple(c.offsets), tuple(c.sizes), slices[key, tuple(c.offsets)]) for c in saved.chunks
    ]
    return Item(key, tuple(saved.size), tuple(chunks))


def _require_paths(found: Mapping[Place, Item], count: int) -> None:
    if () in found or len(found) < count:
        raise InputError(f"{METADATA} is damaged, values have no path or the same one: {COPY}")


def _require_apart(items: Iterable[Item]) -> None:
    """InputError for slices that lie on one another: together they could exceed the files by far."""
    slices = sorted(chunk.slice for item in items for chunk in item.chunks)
    for one, other in pairwise(slices):
        if one.file == other.file and one.offset + one.length > other.offset:
            raise InputError(f"{METADATA} has values that lie on one another in {one.file}: {COPY}")


def _records(data: bytes) -> Any:
    """The pickle's content; only operations that cannot claim more memory than its size are allowed."""
    for operation, argument, _ in pickletools.genops(data):
        claims = operation.name in ("BINPUT", "LONG_BINPUT") and (argument or 0) > len(data)
        if operation.name not in _OPERATIONS or claims:
            raise ValueError(operation.name)
    found = _Records(io.BytesIO(data)).load()
    require_bounded(found, len(data), _Record)
    return found


class _Record:
    """In place of a class of DCP's metadata: stores its arguments and does nothing else."""

    def __init__(self, *values: object) -> None:
        self.values: object = values

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"values": state})


class _Records(pickle.Unpickler):
    """Builds records, sizes and dtypes, and rejects every other global, with its name."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _RECORDS and name in _RECORDS[module]:
            return _Record
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        known = {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): _Record,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise InputError(
                f"{METADATA} requests {module}.{name}, only DCP's own records are read: it is damaged, "
                "or not trustworthy"
            )
        return known[module, name]


# Operations of pickle.dump for records, dicts, lists, tuples, text and numbers, protocols 2 to 5.
# fmt: off
_OPERATIONS = {
    "PROTO", "FRAME", "MARK", "STOP", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE",
    "SETITEM", "SETITEMS", "APPEND", "APPENDS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE",
    "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE",
    "BINUNICODE",
}
# fmt: on
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # The folder in which it was saved; pathlib._local in Python 3.13.
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath", "PurePosixPath"},
}
