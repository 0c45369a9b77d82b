"""Optimizer states of every format, and the files of names beside them."""

import io
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from funcprobe.adapters import inspection
from funcprobe.adapters.optimizer import find_sidecar, open_state, read_adam_state
from funcprobe.adapters.optimizer.sidecar import FILE
from funcprobe.types import Params
from support.small_lora import make_model, registry, trainable

from .codecs import built, json_text, tensor, torch_archive, torch_file
from .target import Target, pair, written

BIT8 = "__bnb_optimizer_quant_state__"


@cache
def small() -> tuple[torch.nn.Module, Params]:
    model = make_model("norms")
    return model, registry(model)


def _shapes() -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in trainable(small()[0]).values()]


def _group(params: list[Any], **changes: Any) -> dict[str, Any]:
    betas = {"@": "tuple", "items": [0.9, 0.999]}
    settings = {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    return settings | {"maximize": False, "initial_lr": 1e-3, "params": params} | changes


def _positions() -> dict[str, Any]:
    shapes = _shapes()
    state = {
        f"#{i}": {"step": tensor(()), "exp_avg": tensor(s), "exp_avg_sq": tensor(s)}
        for i, s in enumerate(shapes)
    }
    return {"state": state, "param_groups": [_group(list(range(len(shapes)))), _group([])]}


def _named() -> dict[str, Any]:
    names = list(trainable(small()[0]))
    found = _positions()
    state = dict(zip(names, found["state"].values(), strict=True))
    return {"state": state, "param_groups": [_group(names)]}


def _eight_bit() -> dict[str, Any]:
    """Codes for every parameter, as bitsandbytes has them of larger ones."""
    shapes = _shapes()
    state = {f"#{i}": {BIT8: _codes(shape), "step": 3} for i, shape in enumerate(shapes)}
    return {"state": state, "param_groups": [_group(list(range(len(shapes))), alpha=0.0), _group([])]}


def _codes(shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        f"{part}{i}": tensor(of, dtype=dtype)
        for i in (1, 2)
        for part, of, dtype in (
            ("state", shape, "uint8"),
            ("qmap", (256,), "float32"),
            ("absmax", (1,), "float32"),
        )
    }


def read_state(path: Path) -> None:
    """As a run reads it, and as `funcprobe inspect` shows it."""
    document = inspection.inspect(path)
    json.dumps(document, allow_nan=False)
    inspection.show(document, Console(file=io.StringIO(), highlight=False))
    read_adam_state(path, *small(), accept_positional=True, allow_low_coverage=True)


def _one_file(name: str) -> Any:
    def read(data: bytes, folder: Path) -> None:
        read_state(written(folder, name, data))

    return read


def _verl(data: bytes, folder: Path) -> None:
    """The first half of the files' bytes is the optimizer's, the rest the model's, by a marker."""
    state, _, model = data.partition(b"<model>")
    if model:
        written(folder, "actor/model_world_size_1_rank_0.pt", model)
    open_state(written(folder, "actor/optim_world_size_1_rank_0.pt", state))


def _verl_files(value: Any) -> bytes:
    parts = value if isinstance(value, list) and len(value) == 2 else [value, {}]
    return torch_file(parts[0]) + b"<model>" + torch_file(parts[1])


def _deepspeed(data: bytes, folder: Path) -> None:
    """Files of a universal checkpoint, each after its name."""
    for part in data.split(b"<file>")[1:9]:
        name, _, content = part.partition(b"<is>")
        place = name.decode("ascii", "replace")
        if place.startswith("zero/") and ".." not in place and "\0" not in place and len(place) < 90:
            written(folder, place, content)
    open_state(folder / "zero")


def _deepspeed_files(value: Any) -> bytes:
    files = value if isinstance(value, dict) else {}
    return b"".join(
        b"<file>" + name.encode("ascii", "replace") + b"<is>" + torch_file(content)
        for name, content in files.items()
    )


def _universal() -> dict[str, Any]:
    moments = {
        f"zero/a.lora_A/{key}.pt": {"param": tensor((2, 3))} for key in ("exp_avg", "exp_avg_sq")
    }
    groups = [_group([]) | {"bias_correction": True, "step": 3}]
    common = {"param_groups": groups, "optimizer_state_dict": {"state": {"#0": {"step": 3}}}}
    return {**moments, "zero/a.lora_A/step.pt": tensor(()), "zero/optimizer_state.pt": common}


def _dcp(data: bytes, folder: Path) -> None:
    metadata, _, shard = data.partition(b"<shard>")
    written(folder, "optimizer_0/__0_0.distcp", shard)
    written(folder, "optimizer_0/.metadata", metadata)
    open_state(folder / "optimizer_0")


def _dcp_files(value: Any) -> bytes:
    """A checkpoint whose items are `{"key": {"path": .., "value": ..}}`, one chunk each."""
    value = value if isinstance(value, dict) else {}
    shard, saved, places, storage = b"", {}, {}, {}
    for key, described in value.items():
        item = described if isinstance(described, dict) else {"value": described}
        content = built(item.get("value"))
        file = io.BytesIO()
        torch.save(content, file)
        size = item.get("size", list(getattr(content, "shape", ())))
        chunk = ChunkStorageMetadata(item.get("offsets", [0] * len(size)), size)
        whole = torch.is_tensor(content)
        saved[key] = (
            TensorStorageMetadata(TensorProperties(), item.get("whole", size), [chunk])
            if whole
            else BytesStorageMetadata()
        )
        places[key] = tuple(item.get("path", [key]))
        at = MetadataIndex(key, torch.Size(chunk.offsets) if whole else None)
        storage[at] = _StorageInfo(
            item.get("file", "__0_0.distcp"),
            item.get("offset", len(shard)),
            item.get("length", len(file.getvalue())),
        )
        shard += file.getvalue()
    return pickle.dumps(Metadata(saved, places, storage)) + b"<shard>" + shard


def _checkpoint() -> dict[str, Any]:
    items = {
        f"state.a.{key}": {"path": ["state", "a", key], "value": tensor((2, 3))}
        for key in ("exp_avg", "exp_avg_sq")
    }
    group = {key: value for key, value in _group(["a"]).items() if key != "betas"}
    return items | {
        f"param_groups.0.{key}": {"path": ["param_groups", 0, key], "value": value}
        for key, value in (group | {"betas": [0.9, 0.999]}).items()
    }


def _sidecar(data: bytes, folder: Path) -> None:
    from funcprobe.adapters.config.schema import Config
    from funcprobe.adapters.stages.run_settings import with_run_settings

    written(folder, FILE, data)
    state = written(folder, "optimizer.pt", _state_of_names())
    sidecar = find_sidecar(state)
    assert sidecar is not None
    inspection.inspect(state)
    given = {"optimizer": {"state": str(state)}, "policy": {"checkpoint": str(folder)}}
    with_run_settings(Config.model_validate(given), lambda _: None)


@cache
def _state_of_names() -> bytes:
    return torch_file(_positions())


def _sidecars() -> list[Any]:
    names = list(trainable(small()[0]))
    shapes = [list(shape) for shape in _shapes()]
    ours = {
        "format": "funcprobe.optimizer_param_names",
        "version": 1,
        "global_step": 2,
        "groups": [{"names": names, "shapes": shapes}, {"names": [], "shapes": []}],
        "max_grad_norm": 0.3,
        "loss": {"loss_type": "grpo", "beta": 0.0, "scale_rewards": "group", "epsilon": 0.2},
        "sampling": {"temperature": 0.9, "num_generations": 8, "max_completion_length": 64},
        "versions": {"torch": "2.13.0"},
    }
    counts = {"generation_batch_size": 64, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    return [ours, ours | {"loss": ours["loss"] | counts}, names, {"param_names": names}]


@cache
def _archives() -> tuple[bytes, ...]:
    return tuple(torch_file(value) for value in (_positions(), _named(), _eight_bit()))


def _archive(data: bytes) -> bytes:
    """The first byte is the number of the archive, the others are its pickle."""
    like = _archives()[data[0] % len(_archives()) if data else 0]
    return torch_archive(data[1:], like)


def _archived(data: bytes, folder: Path) -> None:
    read_state(written(folder, "optimizer.pt", _archive(data)))


def _pickles() -> list[bytes]:
    import zipfile

    return [
        bytes([i]) + zipfile.ZipFile(io.BytesIO(file)).read("archive/data.pkl")
        for i, file in enumerate(_archives())
    ]


def targets() -> list[Target]:
    return [
        *pair(
            "optimizer",
            _one_file("optimizer.pt"),
            [_positions(), _named(), _eight_bit()],
            torch_file,
        ),
        Target("optimizer:pickle", _archived, _pickles),
        *pair("verl", _verl, [[_positions(), {"a.lora_A": tensor((2, 3))}]], _verl_files),
        *pair("deepspeed", _deepspeed, [_universal()], _deepspeed_files),
        *pair("dcp", _dcp, [_checkpoint()], _dcp_files),
        *pair("sidecar", _sidecar, _sidecars(), json_text),
    ]
