"""A LoRA adapter on disk: its location in a trainer's checkpoint, and its configuration."""

from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftType

from funcprobe.types import InputError

from ..config.schema import PolicyConfig
from .base import UNLOADABLE, is_local, short

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# verl's locations, in the folder of a step and in that of the actor.
VERL_FOLDERS = ("lora_adapter", "actor/lora_adapter")
# peft's initialisations that leave the base unchanged, and those that peft subtracts from the base,
# reproducibly, whenever it loads such an adapter.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
REPEATABLE_INITS = ("pissa", "olora")


def find_adapter(checkpoint: str, subfolder: str | None) -> tuple[str, str | None]:
    """(folder, None) of the adapter of a local checkpoint; a hub id and its subfolder unchanged.

    A folder without an adapter may be verl's `global_step_N` or its `actor`. Raises InputError if no
    adapter is found, or several.
    """
    if not is_local(checkpoint):
        return checkpoint, subfolder
    place = Path(checkpoint).expanduser() / (subfolder or "")
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
        f"{place} has no adapter_config.json: a LoRA checkpoint as peft or a trainer writes "
        "it is expected (adapter_config.json and adapter_model.safetensors)"
    )


def read_adapter_config(checkpoint: str, subfolder: str | None) -> LoraConfig:
    """The adapter's configuration, as trainable. InputError unless it is that of a LoRA adapter."""
    source, subfolder = find_adapter(checkpoint, subfolder)
    try:
        adapter_config = PeftConfig.from_pretrained(source, subfolder=subfolder)
    except UNLOADABLE as error:
        raise InputError(
            f"the adapter's configuration cannot be loaded from {source} ({short(error)}): "
            "expected a checkpoint folder, or a hub id that this machine can reach"
        ) from error
    # AdaLoRA's configuration is a LoraConfig as well, but its forward differs.
    if not isinstance(adapter_config, LoraConfig) or adapter_config.peft_type is not PeftType.LORA:
        kind = getattr(adapter_config.peft_type, "value", adapter_config.peft_type)
        raise InputError(
            f"{source} has no LoRA parameters: its adapter_config.json has peft_type = {kind}; "
            "give a checkpoint with a LoRA adapter"
        )
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
    if adapter_config.target_parameters:
        raise InputError(
            f"{config.checkpoint}: the adapter has target_parameters, as "
            f"{adapter_config.target_parameters[0]}, through which torch.func cannot differentiate: "
            "only target_modules are supported"
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


def _has_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
