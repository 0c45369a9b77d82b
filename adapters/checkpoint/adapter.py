"""A LoRA adapter on disk: its location in a trainer's checkpoint, and its configuration."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ResolvedRevision, hf_hub_download
from peft import LoraConfig, PeftType
from transformers.utils.hub import resolve_revision

from funcprobe.types import InputError

from .. import strict_json
from ..config.schema import PolicyConfig
from ..machine.home import expanded
from ..machine.pointers import pointer
from .adapter_fields import NESTED, check_fields
from .base import UNLOADABLE, is_local, short
from .patterns import require_quick

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# verl's locations, in the folder of a step and in that of the actor.
VERL_FOLDERS = ("lora_adapter", "actor/lora_adapter")
# peft's initialisations that leave the base unchanged, and those that peft subtracts from the base,
# reproducibly, whenever it loads such an adapter.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
REPEATABLE_INITS = ("pissa", "olora")


class BaseName(NamedTuple):
    """Which base model the adapter is put on, as far as it is known before loading."""

    id: str  # folder or hub id
    revision: str | None  # branch, tag or commit of a hub id, as asked for; None: its default branch
    version: str | None  # the same, resolved to a commit if that is possible; None for a folder
    lines: tuple[str, ...]

    @property
    def commit(self) -> str | None:
        """The commit that is loaded, where it is known. (transformers 5 no longer keeps it.)"""
        return self.version.resolved if isinstance(self.version, ResolvedRevision) else None


def full_model(config: PolicyConfig) -> str | None:
    """The folder of policy.checkpoint if it has a whole model instead of an adapter; else None.

    InputError for settings that an adapter alone has.
    """
    place = expanded(config.checkpoint)
    if not has_full_model(place):
        return None
    what = f"{place} has a whole model (config.json without adapter_config.json)"
    if config.mode == "qlora":
        raise InputError(
            f'{what}, and policy.mode = "qlora" would quantise the weights that were trained, which '
            'then have no gradient: set policy.mode = "lora"'
        )
    for key, value in (("base", config.base), ("revision", config.revision)):
        if value is not None:
            raise InputError(f"{what}, all of which was trained: remove policy.{key} = {value}")
    if config.adapter != "default":
        raise InputError(f"{what}: remove policy.adapter = {config.adapter}")
    return str(place)


def has_full_model(place: Path) -> bool:
    """Whether a folder has a model's configuration and weights, and no adapter in it or below."""
    patterns = ("model*.safetensors*", "pytorch_model*.bin*")
    weights = any(path.is_file() for pattern in patterns for path in place.glob(pattern))
    adapters = any(place.glob("**/adapter_config.json"))
    return weights and (place / "config.json").is_file() and not adapters


def find_adapter(checkpoint: str, subfolder: str | None) -> tuple[str, str | None]:
    """(folder, None) of the adapter of a local checkpoint; a hub id and its subfolder unchanged.

    A folder without an adapter may be verl's `global_step_N` or its `actor`. Raises InputError if no
    adapter is found, or several.
    """
    if not is_local(checkpoint):
        return checkpoint, subfolder
    place = expanded(checkpoint) / (subfolder or "")
    if not place.is_dir():
        raise InputError(f"{place}: no such folder; set policy.checkpoint to a checkpoint folder")
    if _has_adapter(place):
        return str(place), None
    inside = [place / name for name in VERL_FOLDERS if _has_adapter(place / name)]
    if len(inside) == 1:
        return str(inside[0]), None
    # Others are ambiguous: checkpoint-100 beside checkpoint-200, or "ref" without the policy.
    inside = inside or sorted(p for p in place.iterdir() if p.is_dir() and _has_adapter(p))
    if inside:
        names = ", ".join(str(p.relative_to(place)) for p in inside[:4])
        raise InputError(
            f"{place} has no adapter_config.json, {len(inside)} of its folders do ({names}): set "
            "policy.checkpoint to one of them"
        )
    if any(place.glob("model_world_size_*_rank_*.pt")):
        raise InputError(
            f"{place} has verl's shards but no lora_adapter/: run verl.model_merger on it, and set "
            "policy.checkpoint to the lora_adapter/ that it writes"
        )
    raise InputError(
        f"{place} has neither adapter_config.json nor a whole model: a checkpoint as peft or a trainer "
        "writes it is expected (adapter_config.json and adapter_model.safetensors, or config.json and "
        "model.safetensors)"
    )


def read_adapter_config(checkpoint: str, subfolder: str | None) -> LoraConfig:
    """The adapter's configuration, as trainable.

    InputError unless it is that of a LoRA adapter, all of whose settings can be applied.
    """
    source, subfolder = find_adapter(checkpoint, subfolder)
    try:
        found = _read_fields(source, subfolder)
    except UNLOADABLE as error:
        raise pointer(Path(source), "adapter_config.json") or _unreadable(source, error) from error
    # AdaLoRA's configuration is a LoraConfig as well, but its forward differs.
    if (kind := found.get("peft_type")) != PeftType.LORA:
        raise InputError(
            f"{source} has no LoRA parameters: its adapter_config.json has peft_type = {kind}; "
            "give a checkpoint with a LoRA adapter"
        )
    check_fields(found, source)
    require_quick(found, source)
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - NESTED
    try:
        with warnings.catch_warnings():
            # peft's advice on settings; every one of them is decided in adapter_fields.py.
            warnings.simplefilter("ignore", UserWarning)
            adapter_config = LoraConfig(**{key: found[key] for key in fields & found.keys()})
    except UNLOADABLE as error:
        raise _unreadable(source, error) from error
    adapter_config.inference_mode = False  # trainers save true; the registry needs gradients
    return adapter_config


def check_adapter_config(adapter_config: LoraConfig, config: PolicyConfig) -> None:
    """InputError for settings with which the policy would differ from the one that was trained."""
    if adapter_config.lora_alpha == 0:
        raise InputError(
            f"{config.checkpoint}: adapter_config.json has lora_alpha = 0, which would disable the "
            "adapter (verl's merger writes 0 if the value is unknown; it may be in "
            "lora_train_meta.json): set it to the training run's lora_alpha"
        )
    init = adapter_config.init_lora_weights
    if init in PLAIN_INITS:
        return
    if init not in REPEATABLE_INITS:
        raise InputError(
            f'{config.checkpoint}: init_lora_weights = "{init}" changed the base, or the forward, in a '
            "way that loading cannot reproduce: if it changed the base, save that base, set "
            "policy.base to it, and init_lora_weights to true in adapter_config.json"
        )
    if config.dtype == "float64" or config.mode == "qlora":
        raise InputError(
            f'{config.checkpoint}: init_lora_weights = "{init}" subtracts the initial factors from the '
            "base, which peft supports for unquantised weights of at most float32: set policy.dtype = "
            '"float32" and policy.mode = "lora"'
        )


def base_name(adapter_config: LoraConfig, config: PolicyConfig) -> BaseName:
    """The base of the configuration, else the adapter's, with the revision that belongs to it.

    The revision in adapter_config.json is one of the adapter's own base. InputError if no base is
    known, and for policy.revision of a folder, which has no revisions.
    """
    named = adapter_config.base_model_name_or_path
    if not (config.base or named):
        raise InputError(f"{config.checkpoint} does not record its base model: set policy.base")
    base_id, own = str(expanded(str(config.base or named))), adapter_config.revision
    lines = []
    if named and base_id != str(named):
        at = f" at revision {own}" if own else ""
        lines.append(f"note: the adapter was saved with another base, {named}{at}")
        own = None
    if is_local(base_id):
        if config.revision:
            raise InputError(
                f"policy.revision = {config.revision}, but the base is the folder {base_id}, which has "
                "no revisions: remove it, or set policy.base to a hub id"
            )
        if own:
            lines.append(
                f"note: revision {own} in adapter_config.json is ignored: the base is the folder "
                f"{base_id}, which has no revisions"
            )
        return BaseName(base_id, None, None, tuple(lines))
    if config.revision and own and config.revision != own:
        lines.append(f"note: the adapter was saved with revision {own} of its base")
    revision = config.revision or own
    return BaseName(base_id, revision, resolve_revision(base_id, revision), tuple(lines))


class Adapter(NamedTuple):
    """An adapter before its weights are read."""

    source: str  # folder or hub id
    subfolder: str | None
    config: LoraConfig
    base: BaseName


def open_adapter(config: PolicyConfig) -> Adapter:
    """The adapter of a configuration, checked; InputError as the functions above raise it."""
    source, subfolder = find_adapter(
        config.checkpoint, None if config.adapter == "default" else config.adapter
    )
    adapter_config = read_adapter_config(source, subfolder)
    check_adapter_config(adapter_config, config)
    return Adapter(source, subfolder, adapter_config, base_name(adapter_config, config))


def _read_fields(source: str, subfolder: str | None) -> dict[str, Any]:
    """adapter_config.json as it is written, with the keys that peft would drop."""
    if is_local(source):
        file = Path(source) / (subfolder or "") / "adapter_config.json"
    else:
        file = Path(hf_hub_download(source, "adapter_config.json", subfolder=subfolder))
    found = strict_json.parse(file.read_text(encoding="utf-8"), nan=True)
    if not isinstance(found, dict):
        raise TypeError(f"a JSON object is expected, {type(found).__name__} was found")
    return found


def _unreadable(source: str, error: Exception) -> InputError:
    return InputError(
        f"the adapter's configuration cannot be loaded from {source} ({short(error)}): "
        "expected a checkpoint folder, or a hub id that this machine can reach"
    )


def _has_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
