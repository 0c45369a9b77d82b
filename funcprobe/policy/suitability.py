"""Models whose outputs would silently differ from the policy's are rejected, with the reason."""

import math
import re
from itertools import accumulate
from typing import Any

from torch import nn

from ..types import InputError, Params
from .rows import Rows


def require_causal_lm(model: nn.Module) -> None:
    """InputError unless this is a Hugging Face decoder with an output embedding, which logits need."""
    base = causal_lm(model)
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    embedding = getattr(base, "get_output_embeddings", lambda: None)()
    if embedding is None or encodes:
        why = "an encoder-decoder" if encodes else "without an output embedding"
        raise InputError(
            f"the model is {type(base).__name__}, {why}: a causal language model is expected, as "
            "AutoModelForCausalLM loads it"
        )


def refuse_unsuitable(model: nn.Module, params: Params) -> None:
    """InputError for what may change between calls: modes, hooks, compiled or merged layers."""
    if not params:
        raise InputError("the model has no trainable parameters: load the adapter as trainable")
    named = list(model.named_modules())  # once, as this precedes every forward
    modules = [module for _, module in named]
    if any(module.training for module in modules):
        raise InputError(
            "the model, or one of its modules, is in training mode, so that dropout is active: call "
            "model.eval()"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        raise InputError(
            "gradient checkpointing is on, which torch.func cannot differentiate: "
            "call gradient_checkpointing_disable() and disable_input_require_grads()"
        )
    if getattr(causal_lm(model), "_require_grads_hooks", None):
        raise InputError(
            "input gradients are enabled, which torch.func cannot differentiate: "
            "call disable_input_require_grads()"
        )
    for name, module in causal_lm(model).named_modules():
        # The model as a whole may be compiled: only its parts are called here.
        if name and (getattr(module, "_compiled_call_impl", None) or "_orig_mod" in module._modules):
            raise InputError(
                f"{name} is compiled, which torch.func cannot differentiate: bind the model before "
                "compile(), or set its _compiled_call_impl to None meanwhile"
            )
    names = {name for name, _ in model.named_parameters()}
    if unknown := sorted(params.keys() - names):
        raise InputError(
            f"{unknown[0]} is not a parameter of this model: use names of model.named_parameters()"
        )
    prefixes = {p for n in params for p in accumulate(n.split("."), "{}.{}".format)}
    for name, module in named:
        if not hasattr(module, "active_adapters"):
            continue
        # lora_A, lora_embedding_A, modules_to_save, ...: each a dict of adapters.
        dicts = {
            f"{name}.{kind}": adapters
            for kind, adapters in module.named_children()
            if isinstance(adapters, nn.ModuleDict | nn.ParameterDict)
        }
        if not dicts:
            continue
        used = {
            a for prefix, adapters in dicts.items() for a in adapters if f"{prefix}.{a}" in prefixes
        }
        active: set[str] = set(module.active_adapters)
        if used - active or getattr(module, "disable_adapters", False):
            raise InputError(
                f"{name}: adapter {', '.join(sorted(used - active)) or 'layers'} not active, so that "
                "its parameters would be ignored: call set_adapter() and leave disable_adapter()"
            )
        if getattr(module, "merged", False):
            raise InputError(f"{name}: the adapter is merged into the base: call unmerge_adapter()")


def refuse_padding_rows(model: nn.Module, params: Params) -> None:
    """InputError for a trained embedding with padding_idx.

    torch 2.13 leaves that row out of a gradient in reverse mode and keeps it in forward mode, so that
    where the padding token occurs as text (one that also ends a turn, say) derivatives disagree.
    """
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        # peft keeps the table, its copies and its factors below one name.
        place = re.sub(r"\.(base_layer|original_module|modules_to_save\.[^.]+)$", "", path)
        if any(name.startswith(f"{place}.") for name in params):
            raise InputError(
                f"{path} is trained and has padding_idx = {module.padding_idx}, whose row torch leaves "
                "out of gradients alone: set its padding_idx to None"
            )


def refuse_unsupported(model: nn.Module) -> None:
    """InputError for what cannot change later: packed weights, forwards other than W x + s B A x."""
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or not p.is_floating_point():
            raise InputError(
                f"{name} is a {type(p).__name__} of {p.dtype}, a plain floating-point parameter is "
                "expected: load the base unquantised, or, for a bitsandbytes 4-bit base, call "
                "funcprobe.adapters.checkpoint.quantised.freeze_quantised(model) before binding and "
                "before any training"
            )
    for name, module in model.named_modules():
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            if adapter not in module.active_adapters:
                continue
            kind = type(variant).__name__
            if kind.startswith("Dora"):
                raise InputError(
                    f"{name}: DoRA is not supported: peft holds its weight norm fixed in derivatives, "
                    "so that they are not those of the policy; use plain LoRA"
                )
            raise InputError(
                f"{name}: peft's {kind} is not supported, as its forward is not W x + s B A x: use "
                "plain LoRA"
            )


def longest_position(model: nn.Module) -> float:
    """Tokens up to which a rotary embedding does not depend on the other sequences of its batch.

    Beyond the length of the original training, transformers chooses the frequencies of "dynamic" and
    "longrope" from the longest sequence of the batch. Infinite for other embeddings.
    """
    config = causal_lm(model).config
    config = getattr(config, "get_text_config", lambda: config)()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if "rope_type" not in rope else [rope]  # per type of layer in some models
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if isinstance(kind, dict) and kind.get("rope_type") in {"dynamic", "longrope"}
    ]
    return min(limits, default=math.inf)


def refuse_longer(rows: Rows, limit: float) -> None:
    """InputError for a sequence of more tokens than `longest_position`."""
    if limit == math.inf:
        return
    packing = rows.packing
    length = rows.tokens_NL.shape[1] if packing is None else int(packing.position_1S.max()) + 1
    if length > limit:
        raise InputError(
            f"a sequence has {length} input tokens: above {limit:g} this model's rotary embedding "
            "depends on the longest sequence of a microbatch; use shorter prompts and responses"
        )


def causal_lm(model: Any) -> Any:
    """The Hugging Face model without its peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
