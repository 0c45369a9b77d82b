"""A base model's folder, before anything is built from it: its sizes are those of its files.

A configuration of a hundred bytes can ask for a billion layers, or for matrices that no memory holds;
an index of weights can name files elsewhere.
"""

from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from funcprobe.types import InputError

from .. import strict_json
from ..machine.archives import why_not_plain
from ..machine.pointers import pointer
from .patterns import MOST_LAYERS

MOST_EXPERTS = 100_000  # in all layers
NUMBERS, ALLOWANCE = 4, 1 << 24  # parameters for a byte of the files, of which 4-bit weights have two
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def require_plausible(folder: Path) -> None:
    """InputError for a local base's configuration of more layers than any model has; for an index
    that names files outside the folder; and for a compressed .bin file. A hub id is not looked at.
    """
    if not folder.is_dir():
        return
    config = folder / "config.json"
    if config.is_file():
        _require_few_layers(_read(config), config)
    for index in folder.glob("*.index.json"):
        files = _read(index).get("weight_map")
        names = set(files.values()) if isinstance(files, dict) and _all_text(files) else set()
        for name in sorted(names):
            if PurePath(name).name != name or "\0" in name or name in (".", ".."):
                raise InputError(
                    f"{index} names {name!r:.120}, which is not a file of this folder: copy it again"
                )
    for file in folder.glob("*.bin"):
        if why := why_not_plain(file):
            raise InputError(f"{file} {why}: copy it again, or save the model as safetensors")


def require_as_many_numbers(folder: Path, config: Any, remedy: str) -> None:
    """InputError for a configuration of a model that is far larger than the weights in the folder.

    transformers would give what is missing in the files memory and random values, and say so after.
    """
    files = [file for pattern in _WEIGHTS for file in folder.glob(pattern)] if folder.is_dir() else []
    if not files or type(config) not in AutoModelForCausalLM._model_mapping:
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        LookupError,
        ArithmeticError,
        ImportError,
    ):
        return  # the loader says what is wrong
    count = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in files)
    if count > NUMBERS * size + ALLOWANCE:
        raise InputError(
            f"base {folder}: its config.json is of a model of {count:,} parameters, its weights have "
            f"{size:,} bytes; {remedy} with complete weights"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = strict_json.parse(path.read_text(encoding="utf-8"), nan=True)
    except (OSError, ValueError) as error:
        raise pointer(path) or InputError(
            f"{path} cannot be read as JSON ({error}): copy it again"
        ) from error
    if not isinstance(found, dict):
        raise InputError(
            f"{path} is a {type(found).__name__}, a JSON object is expected: copy it again"
        )
    return found


def _require_few_layers(config: dict[str, Any], path: Path) -> None:
    layers, experts = 1, 1
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for name, value in ((name, value) for part in parts for name, value in part.items()):
        if type(value) is not int or "id" in name.split("_"):
            continue
        if any(word in name for word in ("layer", "block", "depth")) and "size" not in name:
            layers = max(layers, value)
        if "experts" in name:
            experts = max(experts, value)
    if layers > MOST_LAYERS or layers * experts > MOST_EXPERTS:
        raise InputError(
            f"{path} asks for {layers:,} layers of {experts:,} experts, at most {MOST_LAYERS:,} and "
            f"{MOST_EXPERTS:,} of both are read: it is damaged"
        )


def _all_text(files: dict[str, Any]) -> bool:
    return all(isinstance(name, str) for name in files.values())
