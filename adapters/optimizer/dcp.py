"""Folders of torch.distributed.checkpoint (DCP): FSDP's sharded states, and the output of `dcp.save`.

torch's own reader would execute code in values that are not tensors; here these are read as in
torch_file, and `.metadata` as in dcp_metadata.
"""

import io
import math
import os
from pathlib import Path
from typing import Any

import torch

from funcprobe.types import InputError

from . import eight_bit
from .dcp_metadata import COPY, METADATA, Chunk, Item, Place, Slice, read_index
from .saved import Saved, located, some
from .torch_file import load_plain, well_formed

LARGEST = 1 << 50  # bytes of a value, beyond any file
FORMAT = "torch.distributed.checkpoint"


def recognises(path: Path) -> bool:
    """Whether the folder is a DCP checkpoint of any content, also one without its .metadata."""
    return (path / METADATA).is_file() or any(path.glob("*.distcp"))


def inside(checkpoint: Path) -> list[Path]:
    """Folders in a checkpoint that contain an optimizer's state, such as accelerate's `optimizer_0`.

    Raises InputError, with the folder, if one cannot be read.
    """
    files = (f for pattern in (f"*/{METADATA}", "*/*.distcp") for f in checkpoint.glob(pattern))
    found = []
    for folder in sorted({file.parent for file in files}):
        try:
            if _roots(read_index(folder)):
                found.append(folder)
        except InputError as error:
            raise located(folder, error) from error
    return found


def read(path: Path) -> Saved:
    """The state of the single optimizer in the folder, nested or flattened; shards are assembled.

    `{"state": .., "param_groups": ..}` may be all that was saved, or lie under keys beside the model;
    nothing else is read. Raises InputError if there is none, or several; if a file is missing, damaged
    or truncated, or chunks do not form a tensor, with the parameter; and if anything but tensors and
    numbers is requested.
    """
    index = read_index(path)
    roots = _roots(index)
    if not roots:
        keys = {str(place[0]) for place in index}
        raise InputError(
            f"contains no optimizer's param_groups, only {some(keys) or 'nothing'}: {_GIVE}"
        )
    if len(roots) > 1:
        several = some(".".join(map(str, root)) or "the top level" for root in roots)
        raise InputError(
            f"contains several optimizers ({several}): save the policy's in a separate folder"
        )
    (root,) = roots
    content: dict[str, Any] = {}
    for place, item in index.items():
        if _root(place) == root:
            _put(content, place[len(root) :], _value(path, item))
    return eight_bit.dequantised(well_formed(path, _state_dict(content), FORMAT))


_GIVE = "give the folder in which the optimizer was saved (accelerate names it optimizer_0)"


# Values


def _value(folder: Path, item: Item) -> Any:
    if item.size is None:
        return _load(folder, item.key, item.chunks[0].slice)
    parts = [(chunk, _tensor(folder, item.key, chunk)) for chunk in item.chunks]
    if len({part.dtype for _, part in parts}) != 1 or not _partition(item.size, item.chunks):
        raise InputError(f"the chunks of {item.key} do not form its size {item.size}: {COPY}")
    whole = torch.empty(item.size, dtype=parts[0][1].dtype)
    for chunk, part in parts:
        whole[_window(chunk)] = part
    return whole


def _partition(size: tuple[int, ...], chunks: tuple[Chunk, ...]) -> bool:
    """Whether the chunks cover every element once; as they were read before, memory is bounded."""
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        return False
    covered = torch.zeros(size, dtype=torch.bool)
    for chunk in chunks:
        ranks = {len(chunk.offsets), len(chunk.sizes), len(size)}
        if len(ranks) > 1 or min(chunk.offsets, default=0) < 0:
            return False
        covered[_window(chunk)] = True
    return bool(covered.all())


def _window(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))


def _tensor(folder: Path, key: str, chunk: Chunk) -> torch.Tensor:
    part = _load(folder, key, chunk.slice)
    shape = tuple(part.shape) if torch.is_tensor(part) and part.layout is torch.strided else None
    if shape != chunk.sizes:
        found = type(part).__name__ if shape is None else f"shape {shape}"
        raise InputError(
            f"{chunk.slice.file} has {found} for {key}, expected a tensor of {chunk.sizes}: {COPY}"
        )
    plain: torch.Tensor = part.detach()
    return plain


def _load(folder: Path, key: str, place: Slice) -> Any:
    try:
        with (folder / place.file).open("rb") as file:
            file.seek(place.offset)
            # Not more than there is: any length would be given memory first.
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(place.length, size) if place.length < LARGEST else place.length)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{place.file}, with {key}, cannot be read ({why}): {COPY}") from error
    except (ValueError, OverflowError, MemoryError) as error:  # a NUL in a name, too large an offset
        raise InputError(f"{METADATA} is damaged: {key} is at {place!r:.120}: {COPY}") from error
    if len(data) < place.length:
        raise InputError(f"{place.file} is truncated, {key} is missing: {COPY}")
    try:
        return load_plain(io.BytesIO(data))
    except InputError as error:
        raise InputError(f"{key} in {place.file}: {error}") from error


# The optimizer's among these values


def _root(place: Place) -> Place | None:
    """The keys above the optimizer's state_dict that this value may belong to; None if to none."""
    for i, part in enumerate(place):
        if str(part).partition(".")[0] in ("state", "param_groups"):
            return place[:i]
    return None


def _roots(index: dict[Place, Item]) -> set[Place]:
    return {
        root
        for place in index
        if (root := _root(place)) is not None
        and str(place[len(root)]).partition(".")[0] == "param_groups"
    }


def _put(content: dict[Any, Any], place: Place, value: Any) -> None:
    for part in place[:-1]:
        content = content.setdefault(part, {})
        if not isinstance(content, dict):
            raise InputError(f"{some(place)} lies inside a value: {METADATA} is damaged; {COPY}")
    content[place[-1]] = value


def _state_dict(content: dict[str, Any]) -> dict[str, Any]:
    """As optimizer.state_dict(), from numbered items, positions as strings, or flattened keys."""
    state, groups = content.get("state", {}), content.get("param_groups", [])
    flat = {key: value for key, value in content.items() if key not in ("state", "param_groups")}
    if flat:
        state, groups = _unflattened(flat)
    elif isinstance(groups, dict):
        groups = [groups.get(i) for i in range(len(groups))]
    positions = isinstance(groups, list) and all(
        isinstance(group, dict)
        and isinstance(params := group.get("params"), list)
        and all(type(key) is int for key in params)
        for group in groups
    )
    if positions and isinstance(state, dict):
        state = {int(key) if str(key).isdecimal() else key: entry for key, entry in state.items()}
    return {"state": state, "param_groups": groups}


def _unflattened(flat: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """From `state.NAME.exp_avg` and `param_groups.NAME.lr`, where each parameter has its own settings.

    Parameters of equal settings form one group; groups are in the order of their first parameter.
    """
    both: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, value in flat.items():
        part, _, rest = key.partition(".")
        name, _, last = rest.rpartition(".")
        both[part].setdefault(name, {})[last] = value
    groups: dict[str, dict[str, Any]] = {}
    for name, numbers in both["param_groups"].items():
        exact = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in numbers.items()}
        same = groups.setdefault(repr(sorted(exact.items())), numbers | {"params": []})
        same["params"].append(name)
    return both["state"], list(groups.values())
