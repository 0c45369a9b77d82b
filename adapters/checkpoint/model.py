"""Checkpoint folder or hub id -> a policy ready to be bound: adapter active, frozen base, eval mode."""

import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from transformers import GenerationConfig

from funcprobe.policy.forward import trainable_params
from funcprobe.policy.layout import out_of_memory
from funcprobe.types import InputError, Params

from ..config.schema import PolicyConfig
from ..machine.devices import random_state_kept
from .adapter import ADAPTER_FILES, check_adapter_config, find_adapter, read_adapter_config
from .base import UNLOADABLE, is_local, load_base, load_tokenizer, short
from .quantised import freeze_quantised
from .vocabulary import check_vocabulary

# Beginnings of peft's advice on adapters that are to be merged or saved.
_ADVICE = (
    "Setting `save_embedding_layers`",
    "Model has `tie_word_embeddings=True`",
    "Careful, disabling adapter layers with bias",
    "`lora_bias=True` was passed but",
    "fan_in_fan_out is set to",
)


class Policy(NamedTuple):
    """A loaded policy, with its description for the log."""

    model: PeftModel
    tokenizer: Any
    params: Params  # the registry
    eos_ids: tuple[int, ...]
    pad_id: int
    base: str
    commit: str | None  # of a hub id
    attention: str
    lines: tuple[str, ...]


def load_policy(config: PolicyConfig, device: torch.device) -> Policy:
    """Load base, adapter and tokenizer: the adapter active, the base frozen, no dropout, no caches.

    Every adapter tensor must have a parameter of its name and shape, and every LoRA parameter a tensor.
    With mode "qlora" the base's linear layers are `quantised.FrozenLinear4bit`. Raises InputError, one
    line, if anything cannot be loaded, for an adapter of another base or of another type, a base whose
    quantisation does not match `mode`, no LoRA parameters, or more than `max_trainable`.
    """
    source, subfolder = find_adapter(
        config.checkpoint, None if config.adapter == "default" else config.adapter
    )
    adapter_config = read_adapter_config(source, subfolder)
    check_adapter_config(adapter_config, config)
    named = adapter_config.base_model_name_or_path
    base_id = config.base or named
    if not base_id:
        raise InputError(f"{config.checkpoint} does not record its base model: set policy.base")
    base_id = str(Path(str(base_id)).expanduser())
    base, ignored = load_base(base_id, config, device)
    base_size = base.num_parameters()  # counts the entries of a packed 4-bit weight
    places = _tokenizer_places(config.checkpoint, source, base_id)
    tokenizer = load_tokenizer(places, trust_remote_code=config.trust_remote_code)
    check_vocabulary(tokenizer, base.get_input_embeddings().weight.shape[0])
    eos_ids = eos_ids_of(tokenizer, base)
    # generate() takes every unset option from here; a base's own top_p or repetition penalty would
    # sample from a distribution other than that of the importance ratios.
    base.generation_config = GenerationConfig()
    model = _attach_adapter(base, adapter_config, config.adapter, base_id, source, subfolder)
    check_registry(trainable_params(model), config.max_trainable)
    if config.mode == "qlora":
        freeze_quantised(model)
    if config.dtype == "float64":
        model = model.double()
    model.config.use_cache = False
    model = _moved(model, device).eval()
    params = trainable_params(model)
    _require_finite(model, base_id, config.dtype)
    attention = str(base.config._attn_implementation)
    precision = f"nf4 in {config.dtype}" if config.mode == "qlora" else config.dtype
    lines = (
        f"base {base_id}: {base_size:,} parameters, {precision}, {attention} attention, on {device}",
        f"adapter {source} ({config.adapter}): {len(params)} tensors, "
        f"{sum(t.numel() for t in params.values()):,} trainable parameters",
        *ignored,
        *(
            [f"note: the adapter was saved with another base, {named}"]
            if named and base_id != str(named)
            else []
        ),
    )
    commit = getattr(base.config, "_commit_hash", None)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    return Policy(model, tokenizer, params, eos_ids, pad_id, base_id, commit, attention, lines)


def _moved(model: PeftModel, device: torch.device) -> PeftModel:
    try:
        return model.to(device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            f"the policy does not fit into the memory of {device}: free some, take another run.device, "
            'a smaller policy.dtype, or policy.mode = "qlora"'
        ) from error


def check_registry(params: Params, max_trainable: int) -> None:
    """InputError unless some parameter is LoRA's and at most `max_trainable` are trainable."""
    largest = max(params, key=lambda n: params[n].numel(), default="")
    if not any("lora_" in name for name in params):
        found = f"{len(params)} trainable tensors, as {largest}" if params else "nothing trainable"
        raise InputError(f"no LoRA parameters ({found}): give a checkpoint with a LoRA adapter")
    total = sum(t.numel() for t in params.values())
    if total > max_trainable:
        raise InputError(
            f"{total:,} parameters in {len(params)} tensors are trainable (largest: {largest}, "
            f"{params[largest].numel():,}), more than policy.max_trainable = {max_trainable:,}: "
            "raise it if this is intended"
        )


def _attach_adapter(
    base: Any, adapter_config: LoraConfig, name: str, base_id: str, source: str, subfolder: str | None
) -> PeftModel:
    if is_local(source) and not any((Path(source) / file).is_file() for file in ADAPTER_FILES):
        raise InputError(f"{source} has neither {' nor '.join(ADAPTER_FILES)}: copy it again")
    try:
        weights = load_peft_weights(source, device="cpu", subfolder=subfolder)
    except (*UNLOADABLE, pickle.UnpicklingError, RuntimeError, EOFError) as error:  # .bin is a pickle
        raise InputError(
            f"the adapter's weights cannot be loaded from {source} ({short(error)}): copy it again"
        ) from error
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
        except (ValueError, TypeError, AttributeError) as error:  # the last two: damaged file
            raise InputError(
                f"the adapter in {source} does not match base {base_id} ({short(error)}): "
                "set policy.base to the model it was trained on"
            ) from error
        expected = get_peft_model_state_dict(model, adapter_name=name)
    _require_same_tensors(expected, weights, source, base_id)
    set_peft_model_state_dict(model, weights, adapter_name=name)
    return model


def _tokenizer_places(checkpoint: str, source: str, base_id: str) -> tuple[str, ...]:
    """Possible locations of its files, nearest first; verl's is huggingface/, beside the adapter."""
    if not is_local(checkpoint):
        return (base_id,)
    folder, adapter = Path(checkpoint).expanduser(), Path(source)
    return str(folder), source, str(adapter.parent / "huggingface"), base_id


def _require_same_tensors(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], source: str, base_id: str
) -> None:
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


def _require_finite(model: PeftModel, base_id: str, dtype: str) -> None:
    """One forward, so that damaged weights and overflow are found before sampling."""
    embeddings = model.get_input_embeddings().weight
    few = torch.arange(min(5, len(embeddings)), device=embeddings.device)[None]
    with torch.no_grad():
        logits = model(input_ids=few, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise InputError(
            f"base {base_id} gives logits that are not finite in {dtype}: its weights are damaged, or "
            'too large for this type; try policy.dtype = "float32"'
        )


def eos_ids_of(tokenizer: Any, base: Any) -> tuple[int, ...]:
    """Tokens that end a response, ascending: of the model's generation config and of the tokenizer.

    InputError if neither has one.
    """
    configured = getattr(base.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    found = sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not found:
        raise InputError(
            "neither tokenizer nor model has an end-of-sequence token, which ends responses: set the "
            "tokenizer's eos_token"
        )
    return tuple(found)
