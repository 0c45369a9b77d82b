"""SHA-256 of values, of files, of the code that computes."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-compatible value, tensors by their bytes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def fingerprint_path(path: Path) -> dict[str, str]:
    """File name -> SHA-256, for a file or the files of a folder.

    Files over 256 MiB (a base's weights) are identified by size and modification time: hashing them
    would take longer than a pass.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return {file.name: _file_hash(file) for file in files}


def fingerprint_code(core: Path, shell: Path, presenting: Collection[str]) -> str:
    """SHA-256 of every Python source of core and shell, with their paths, subfolders included.

    Left out are the folders of the shell that only present what was computed. An installed package has
    the shell in a folder of the core's, a checkout beside it; the hash is the same.
    """
    found = {file.relative_to(core).as_posix(): file for file in core.rglob("*.py")}
    found |= {f"adapters/{file.relative_to(shell).as_posix()}": file for file in shell.rglob("*.py")}
    left_out = tuple(f"adapters/{name}/" for name in presenting)
    return fingerprint({k: _file_hash(file) for k, file in found.items() if not k.startswith(left_out)})


def _file_hash(file: Path) -> str:
    stat = file.stat()
    if stat.st_size > 256 * 2**20:
        return f"size {stat.st_size}, modified {stat.st_mtime_ns}"
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data.tobytes()).hexdigest()]
    raise TypeError(f"{type(value).__name__} has no fingerprint")
