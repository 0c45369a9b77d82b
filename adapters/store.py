"""Run folders that are complete or absent, and stored results of stages."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from funcprobe.types import InputError, Params

from .machine.ranks import ONE_PROCESS, World
from .machine.watch import UNBROKEN

Report: TypeAlias = Callable[[bool], None]
"""Called with whether a result was stored by an earlier run."""


def _ignore(_: bool) -> None: ...


class Stages(NamedTuple):
    """Results of stages, one file each, named by the hash of all their inputs.

    A file appears under its name only when complete, so that an interrupted run loses at most one
    stage. Without a folder nothing is stored. Of several processes all ask, the first one reads and
    writes, and all compute what is not there.
    """

    folder: Path | None
    fresh: bool = False  # compute every result again, also if stored
    writes: bool = True  # else what is stored is read alone
    world: World = ONE_PROCESS

    def tensors(
        self, stage: str, inputs: Any, like: Any, compute: Callable[[], Any], report: Report = _ignore
    ) -> Any:
        """compute(), a tree of tensors with the structure of `like`, or its stored result."""
        folder = self.folder
        if folder is None:
            report(False)
            return compute()

        def find() -> dict[str, Tensor] | None:
            path = _stage_path(folder, stage, inputs, "safetensors")
            if self.fresh or not path.is_file():
                return None
            try:
                return load_file(path)
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{path} cannot be read ({error}): delete it, or use --fresh"
                ) from error

        stored = self.world.on_first(find)
        report(stored is not None)
        if stored is not None:
            return optree.tree_unflatten(
                optree.tree_structure(like), [stored[key] for key in sorted(stored)]
            )
        value = compute()
        if self.world.first:
            leaves = {f"{i:06d}": leaf.contiguous() for i, leaf in enumerate(optree.tree_leaves(value))}
            path = _stage_path(folder, stage, inputs, "safetensors")
            write_whole(path, lambda target: save_file(leaves, target))
        return value

    def has(self, stage: str, inputs: Any) -> bool:
        """Whether tensors of these inputs are stored, and would be read."""
        folder = self.folder
        if folder is None or self.fresh:
            return False
        return self.world.on_first(lambda: _stage_path(folder, stage, inputs, "safetensors").is_file())

    def recall(self, stage: str, inputs: Any) -> Any:
        """The JSON value that `remember` stored; None without one."""
        folder = self.folder
        if folder is None or self.fresh:
            return None

        def read() -> Any:
            try:
                return json.loads(_stage_path(folder, stage, inputs, "json").read_text("utf-8"))
            except (OSError, ValueError):
                return None

        return self.world.on_first(read)

    def remember(self, stage: str, inputs: Any, value: Any) -> None:
        """Store a JSON value, in place of an earlier one."""
        if self.folder is not None and self.writes and self.world.first:
            path = _stage_path(self.folder, stage, inputs, "json")
            write_whole(path, lambda target: write_json(value, target))

    @contextmanager
    def file(
        self,
        stage: str,
        inputs: Any,
        suffix: str,
        compute: Callable[[Path], None],
        report: Report = _ignore,
    ) -> Iterator[Path]:
        """The path of a file that compute(path) writes, if it is not stored.

        Of several processes each has a copy of its own, and calls compute for it.
        """
        folder = self.folder

        def find() -> bytes | None:
            path = None if folder is None else _stage_path(folder, stage, inputs, suffix)
            stored = path is not None and path.is_file() and not self.fresh
            return path.read_bytes() if path is not None and stored else None

        found = self.world.on_first(find)
        report(found is not None)
        with tempfile.TemporaryDirectory() as scratch:
            own = Path(scratch) / f"{stage}.{suffix}"
            kept = folder is not None and self.world.first
            if found is None:
                compute(own)
            elif not kept:
                own.write_bytes(found)
            if folder is not None and kept:
                path = _stage_path(folder, stage, inputs, suffix)
                if found is None:
                    write_whole(path, lambda target: target.write_bytes(own.read_bytes()))
                own = path
            yield own


def require_writable(final: Path) -> None:
    """InputError unless the run folder can be created; called before the computation starts.

    Tested with an empty folder beside it, since permissions alone do not reveal a name that is too long
    or a read-only file system.
    """
    parent = final.absolute().parent
    try:
        if final.exists() and not (final / "manifest.json").is_file():
            raise InputError(f"{final} exists and is not a run folder: choose another run.name")
        parent = next(p for p in final.absolute().parents if p.exists())
        Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise InputError(
            f"{final} cannot be written: {parent}: {error.strerror}; set run.folder or run.name"
        ) from error


def require_place(file: Path) -> None:
    """InputError unless a file can be written there; called before the computation starts."""
    try:
        if file.is_dir():
            raise InputError(f"{file} is a folder: give the name of a file in it")
        parent = next(p for p in file.absolute().parents if p.exists())
        Path(tempfile.mkdtemp(prefix=f".{file.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; give another path") from error


@contextmanager
def run_folder(final: Path) -> Iterator[Path]:
    """A run folder that appears, or is replaced, if the block succeeds; see `whole_folder`."""
    require_writable(final)
    with whole_folder(final) as staging:
        yield staging


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block succeeds and is deleted otherwise."""
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    old = staging.with_name(f"{staging.name}.old")
    with UNBROKEN:
        try:
            yield staging
            staging.chmod(0o755)  # mkdtemp creates a private one
            if final.exists():
                final.replace(old)
            staging.replace(final)
        finally:
            if old.exists() and not final.exists():
                old.replace(final)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(staging, ignore_errors=True)


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


def fingerprint_core(folder: Path) -> dict[str, str]:
    """Path below `folder` -> SHA-256, for every Python source of the core, subfolders included.

    An installed package has the shell in a folder of the core's, a checkout elsewhere: it is left out.
    """
    sources = {file.relative_to(folder): file for file in sorted(folder.rglob("*.py"))}
    return {
        str(place): _file_hash(file) for place, file in sources.items() if place.parts[0] != "adapters"
    }


def require_finite(value: Any, where: str) -> None:
    """InputError for a number in `value` that is not finite, with its place and the keys to check."""
    if isinstance(value, dict):
        place = f" at eta = {value['eta']:g}" if value.get("eta") is not None else ""
        for key, item in value.items():
            require_finite(item, f"{where}{place}, {key}")
    elif isinstance(value, list):
        for item in value:
            require_finite(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            f"{where}, is {value}, a finite number is expected: overflow or underflow occurred, check "
            "measure.etas, optimizer.lr, optimizer.weight_decay and sampling.temperature"
        )


def write_json(value: Any, path: Path) -> None:
    """JSON with a final newline; NaN and infinity are rejected, since JSON has neither."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_params(params: Params, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write parameters by name, in safetensors format, with `metadata` in its header."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in params.items()}, path, metadata)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def _stage_path(folder: Path, stage: str, inputs: Any, suffix: str) -> Path:
    return folder / f"{stage}-{fingerprint(inputs)[:20]}.{suffix}"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write `path` by write(target); it appears, or is replaced, only when complete.

    Parent folders are created. If `write` raises, `path` is unchanged; an error of safetensors becomes
    InputError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.with_name(f".{path.name}.{os.getpid()}")
    with UNBROKEN:
        try:
            write(target)
            target.replace(path)
        except SafetensorError as error:  # also raised for a full disk
            raise InputError(f"{path} cannot be written: {error}") from error
        finally:
            target.unlink(missing_ok=True)


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
