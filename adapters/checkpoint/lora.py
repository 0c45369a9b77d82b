"""An adapter's weights on their base: read, compared with what the base expects, and attached."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights

from funcprobe.types import InputError

from ..machine.archives import why_not_plain
from ..machine.devices import random_state_kept
from ..machine.pointers import pointer
from ..optimizer.bounded import require_bounded
from .adapter import ADAPTER_FILES
from .base import UNLOADABLE, UNPICKLED, is_local, short
from .embeddings import SavedEmbeddings

# Beginnings of peft's advice on adapters that are to be merged or saved.
_ADVICE = (
    "Setting `save_embedding_layers`",
    "Model has `tie_word_embeddings=True`",
    "Careful, disabling adapter layers with bias",
    "`lora_bias=True` was passed but",
    "fan_in_fan_out is set to",
)


def read_weights(source: str, subfolder: str | None) -> dict[str, torch.Tensor]:
    """The tensors of the adapter's file. InputError if there is none, or it cannot be read."""
    files = [Path(source) / (subfolder or "") / file for file in ADAPTER_FILES]
    if is_local(source) and not any(file.is_file() for file in files):
        raise InputError(f"{source} has neither {' nor '.join(ADAPTER_FILES)}: copy it again")
    used = next((file for file in files if file.is_file()), None)
    if used is not None and (why := why_not_plain(used)):
        raise InputError(f"{used} {why}: copy it again")
    try:
        found: dict[str, torch.Tensor] = load_peft_weights(source, device="cpu", subfolder=subfolder)
    except (*UNLOADABLE, *UNPICKLED) as error:
        raise pointer(Path(source), *ADAPTER_FILES) or InputError(
            f"the adapter's weights cannot be loaded from {source} ({short(error)}): copy it again"
        ) from error
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise InputError(f"the adapter's weights in {source} are not tensors by name: copy them again")
    if used is not None:
        try:
            require_bounded(found, used.stat().st_size)
        except InputError as error:
            raise InputError(f"{used} {error}: copy it again") from error
    return found


def attach_adapter(
    base: Any,
    adapter_config: LoraConfig,
    name: str,
    base_id: str,
    source: str,
    weights: dict[str, torch.Tensor],
    embeddings: SavedEmbeddings,
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """The policy, and the frozen embeddings that were copied from the adapter's file.

    InputError unless the file has exactly the tensors that the base and the configuration imply, apart
    from `embeddings`, which it may have.
    """
    _require_rank(adapter_config, weights, source)
    with warnings.catch_warnings():
        # peft 0.21 advises on merging and saving, which are not done here, and uses a deprecated
        # attribute of transformers 5.23.
        for advice in _ADVICE:
            warnings.filterwarnings("ignore", advice, UserWarning)
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        try:
            with random_state_kept():  # initial LoRA weights are drawn, replaced below
                adapter_config.base_model_name_or_path = base_id  # peft warns if it has to change it
                model = get_peft_model(base, adapter_config, adapter_name=name)
                _replicate_types(base, adapter_config)
        except (ValueError, TypeError, AttributeError) as error:  # the last two: damaged file
            raise InputError(
                f"the adapter in {source} does not match base {base_id} ({short(error)}): "
                "set policy.base to the model it was trained on"
            ) from error
        expected = file_tensors(model, name)
    frozen = embeddings.frozen
    weights = {key: t for key, t in weights.items() if key not in embeddings.copies.keys() - expected}
    require_same_tensors(expected | frozen, weights, source, base_id)
    copied = {key: weights.pop(key) for key in frozen}
    for key, parameter in frozen.items():
        parameter.data.copy_(copied[key])
    set_peft_model_state_dict(model, weights, adapter_name=name)
    return model, copied


def file_tensors(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names that they have in its file, sharing the model's memory."""
    with warnings.catch_warnings():
        # Of a bias of LoRA, which has one dimension, peft 0.21.2 says that a shard was saved.
        warnings.filterwarnings("ignore", ".* LoRA tensor.* have invalid shape", UserWarning)
        found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return dict(found)


def _require_rank(adapter_config: LoraConfig, weights: dict[str, torch.Tensor], source: str) -> None:
    """InputError for a rank that no tensor has, before peft makes factors of that size."""
    ranks = [adapter_config.r, *(adapter_config.rank_pattern or {}).values()]
    largest = max((side for tensor in weights.values() for side in tensor.shape), default=0)
    for rank in ranks:
        if type(rank) is int and rank > max(largest, 1024):
            raise InputError(
                f"adapter {source}: adapter_config.json has rank {rank}, but no tensor of its file has "
                f"a side over {largest}: copy both files again"
            )


def _replicate_types(base: Any, adapter_config: LoraConfig) -> None:
    """Give replicated layers their kind of attention, which peft 0.21 leaves out."""
    kinds = getattr(base.config, "layer_types", None)
    if adapter_config.layer_replication and kinds:
        spans = adapter_config.layer_replication
        base.config.layer_types = [kinds[i] for start, end in spans for i in range(start, end)]


def require_same_tensors(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], source: str, base_id: str
) -> None:
    """InputError unless the file has these names and shapes, and finite numbers."""
    remedy = f"base {base_id} is not the model this adapter was trained on: set policy.base"
    if differ := sorted(expected.keys() ^ found.keys()):
        side = "the base has no such parameter" if differ[0] in found else "the file lacks it"
        raise InputError(
            f"adapter {source}: {len(differ)} tensors do not match, as {differ[0]} ({side}); {remedy}"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise InputError(
                f"adapter {source}: {name} has shape {tuple(found[name].shape)}, the base expects "
                f"{tuple(tensor.shape)}; {remedy}"
            )
        if not bool(found[name].isfinite().all()):
            raise InputError(
                f"adapter {source}: {name} contains a non-finite number: the file is damaged"
            )
