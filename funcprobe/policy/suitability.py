"""Models whose numbers would silently be others than the policy's, refused by name."""

import math
from itertools import accumulate
from typing import Any

from torch import nn

from ..types import InputError, Params
from .rows import Rows


def require_causal_lm(model: nn.Module) -> None:
    """InputError unless this is a Hugging Face decoder with an output embedding, as logits need one."""
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
    """InputError for what a caller may have changed since: modes, hooks, compiled or merged layers."""
    if not params:
        raise InputError("the model has no trainable parameters: load the adapter as trainable")
    if any(module.training for module in model.modules()):
        raise InputError(
            "the model, or a module of it, is in training mode, so dropout is on: call model.eval()"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise InputError(
            "gradient checkpointing is on, which torch.func cannot differentiate: "
            "call gradient_checkpointing_disable() and disable_input_require_grads()"
        )
    if getattr(causal_lm(model), "_require_grads_hooks", None):
        raise InputError(
            "input gradients are required, which torch.func cannot differentiate: "
            "call disable_input_require_grads()"
        )
    for name, module in causal_lm(model).named_modules():
        # The model as a whole may be: what is called here are its parts.
        if name and (getattr(module, "_compiled_call_impl", None) or "_orig_mod" in module._modules):
            raise InputError(
                f"{name} is compiled, which torch.func cannot differentiate: bind the model before "
                "compile(), or set its _compiled_call_impl to None meanwhile"
            )
    names = {name for name, _ in model.named_parameters()}
    if unknown := sorted(params.keys() - names):
        raise InputError(f"{unknown[0]} is no parameter of this model: take names from the model")
    prefixes = {p for n in params for p in accumulate(n.split("."), "{}.{}".format)}
    for name, module in model.named_modules():
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
                f"{name}: adapter {', '.join(sorted(used - active)) or 'layers'} not active, so its "
                "parameters would be ignored: call set_adapter() and leave disable_adapter()"
            )
        if getattr(module, "merged", False):
            raise InputError(f"{name}: the adapter is merged into the base: call unmerge_adapter()")


def refuse_unsupported(model: nn.Module) -> None:
    """What no call can change later: packed weights, and forwards that are not W x + s B A x."""
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or not p.is_floating_point():
            raise InputError(
                f"{name} is a {type(p).__name__} of {p.dtype}, a plain floating-point parameter is "
                "expected: load the base unquantised, or, if it is bitsandbytes 4-bit, call "
                "freeze_quantised(model) first, before training, too "
                "(from funcprobe.adapters.checkpoint.quantised)"
            )
    for name, module in model.named_modules():
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            if adapter not in module.active_adapters:
                continue
            kind = type(variant).__name__
            if kind.startswith("Dora"):
                raise InputError(
                    f"{name}: DoRA is not supported: peft holds its weight norm fixed in derivatives, "
                    "so that they are not those of the policy"
                )
            raise InputError(
                f"{name}: peft's {kind} is not supported, its forward is not plain LoRA's W x + s B A x"
            )


def longest_position(model: nn.Module) -> float:
    """The length up to which a token's rotary embedding does not depend on the batch around it.

    transformers picks the frequencies of "dynamic" and "longrope" by the longest sequence it is given,
    beyond the length the model was first trained with.
    """
    config = causal_lm(model).config
    config = getattr(config, "get_text_config", lambda: config)()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if "rope_type" not in rope else [rope]  # by kind of layer, in some models
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
            f"{length} tokens of a sequence are read: above {limit:g} this model's rotary embedding "
            "changes with the longest sequence of a microbatch; use shorter prompts and responses"
        )


def causal_lm(model: Any) -> Any:
    """The Hugging Face model, without peft around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_hooked(module: nn.Module) -> bool:
    """Whether something of the user's runs when the module is called."""
    replaced = "forward" in vars(module)  # accelerate's hooks stand there
    return bool(module._forward_hooks or module._forward_pre_hooks) or replaced
