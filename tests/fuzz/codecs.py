"""From a structure, as JSON has it, to the bytes of a file of each kind."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomlkit
import torch

MOST_ENTRIES = 4096  # of a tensor that has memory of its own
DTYPES = ("float32", "float64", "bfloat16", "float16", "uint8", "int64", "bool", "complex64")


def json_text(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_lines(value: Any) -> bytes:
    rows = value if isinstance(value, list) else [value]
    return "\n".join(json.dumps(row) for row in rows).encode()


def toml_text(value: Any) -> bytes:
    return tomlkit.dumps(_without_null(value if isinstance(value, dict) else {"x": value})).encode()


def parquet(value: Any) -> bytes:
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        part = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(part)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            columns[name] = pa.array([json.dumps(x) for x in part])
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def torch_file(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(built(value), file)
    return file.getvalue()


def torch_archive(pickled: bytes, like: bytes) -> bytes:
    """The archive of torch.save `like`, with another pickle for its structure."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(like)) as source, zipfile.ZipFile(file, "w") as archive:
        for part in source.infolist():
            is_structure = part.filename.endswith("/data.pkl")
            archive.writestr(part.filename, pickled if is_structure else source.read(part))
    return file.getvalue()


def safetensors(value: Any) -> bytes:
    """A header of any content, with as many bytes of tensors as it says, up to 65,536."""
    header = json.dumps(value).encode()
    ends = [x["data_offsets"][-1] for x in value.values() if isinstance(x, dict) and _span(x)]
    return struct.pack("<Q", len(header)) + header + bytes(min(max(ends, default=0), 1 << 16))


def _span(described: dict[str, Any]) -> bool:
    span = described.get("data_offsets")
    return isinstance(span, list) and bool(span) and type(span[-1]) is int and span[-1] >= 0


def built(value: Any) -> Any:
    """With tensors for {"@": dtype, "shape": .., "how": ..}, integers for keys such as "#3"."""
    if isinstance(value, list):
        return [built(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "@" in value:
        return _special(value)
    return {_key(key): built(item) for key, item in value.items()}


def tensor(shape: tuple[int, ...], how: str = "", dtype: str = "float32") -> dict[str, Any]:
    """The description of a tensor."""
    return {"@": dtype, "shape": list(shape), "how": how}


def _key(key: str) -> Any:
    return int(key[1:]) if key.startswith("#") and key[1:].isdecimal() and len(key) < 9 else key


def _special(value: dict[str, Any]) -> Any:
    kind, shape = value["@"], _shape(value.get("shape"))
    if kind == "tuple":
        items = value.get("items")
        return tuple(map(built, items if isinstance(items, list) else [items]))
    if kind == "numpy":
        return np.float64(0.5)
    if kind == "laughs":
        return _shared({"a": 1}, 64)
    if kind == "cycle":
        cycle: dict[str, Any] = {}
        cycle["a"] = cycle
        return cycle
    dtype = getattr(torch, kind) if kind in DTYPES else torch.float32
    how = value.get("how")
    if how in _FORMS:
        return _FORMS[how](shape, dtype)
    small = shape if np.prod(shape or (1,), dtype=float) <= MOST_ENTRIES else (3,)
    return torch.zeros(small, dtype=dtype)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(n for n in value[:6] if type(n) is int and 0 <= n < 2**20)


_FORMS: dict[Any, Callable[[tuple[int, ...], torch.dtype], Any]] = {
    "expanded": lambda shape, dtype: torch.zeros((), dtype=dtype).expand(shape or (2**40,)),
    "meta": lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"),
    "sparse": lambda shape, dtype: torch.sparse_coo_tensor(
        torch.zeros(len(shape), 0, dtype=torch.int64), torch.zeros(0, dtype=dtype), shape
    ),
    "parameter": lambda shape, dtype: torch.nn.Parameter(torch.zeros(2), requires_grad=True),
    "nan": lambda shape, dtype: torch.full((min(shape[0], 9) if shape else 1,), float("nan")),
}


def _shared(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = {"a": value, "b": value}
    return value


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(x) for key, x in value.items() if x is not None}
    if isinstance(value, list):
        return [_without_null(x) for x in value if x is not None]
    return value
