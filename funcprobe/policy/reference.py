"""The policy before its adapter was trained, or with another adapter, as values of its own registry."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..types import InputError, Params

LAST_FACTOR = re.compile(r"lora_(embedding_)?B")
"""Parameters without which an adapter adds nothing: W x + s B A x is W x at B = 0."""

# peft's dicts of adapters: ...lora_A.default.weight, ...modules_to_save.default.bias, and without a
# name behind it where they hold parameters, as ...lora_embedding_A.default does.
_OF_ADAPTER = re.compile(
    r"^(?P<owner>.+)\.(?P<kind>lora_\w+|modules_to_save|trainable_tokens_delta)\.(?P<adapter>[^.]+)"
    r"(?P<rest>(\..+)?)$"
)


def base_params(model: nn.Module, params: Params) -> Params:
    """Values of the registry at which the policy is its base model, with the adapter disabled.

    The last factor of LoRA is 0, lora_bias included, so that every layer adds exactly 0 to W x. Modules
    trained as a whole (modules_to_save) and rows of an embedding (trainable_token_indices) have the
    base's values. Everything else is that of `params`: the first factors, which no longer matter, and
    biases trained in the base itself (bias = "all", "lora_only"), which peft 0.21's disable_adapter()
    leaves as they are, too. The model is not changed.
    """
    return {name: _base_value(model, name, tensor) for name, tensor in params.items()}


def adapter_params(model: nn.Module, params: Params, adapter: str) -> Params:
    """Values of the registry at which the policy is the model with another of its adapters active.

    That adapter must have the settings of the registry's own: rank and scale of each layer are not
    parameters. Biases that are trained in the base itself are common to all. InputError if it lacks a
    parameter, or has one of another shape. The model is not changed.
    """
    own = dict(model.named_parameters())
    values = {}
    for name, tensor in params.items():
        found = _OF_ADAPTER.match(name)
        other = f"{found['owner']}.{found['kind']}.{adapter}{found['rest']}" if found else name
        shape = tuple(own[other].shape) if other in own else None
        if shape != tuple(tensor.shape):
            what = f"has no {other}" if shape is None else f"has {other} of shape {shape}"
            raise InputError(
                f"adapter {adapter} {what}, {tuple(tensor.shape)} is expected as of {name}: both "
                "adapters must have the same settings"
            )
        values[name] = _as(tensor, own[other])
    return values


def _base_value(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    found = _OF_ADAPTER.match(name)
    if found is None:
        return tensor
    if LAST_FACTOR.search(name):
        return torch.zeros_like(tensor)
    if found["kind"] == "modules_to_save":
        return _as(tensor, model.get_parameter(f"{found['owner']}.original_module{found['rest']}"))
    if found["kind"] == "trainable_tokens_delta":
        # Despite the name, the rows themselves.
        layer: Any = model.get_submodule(found["owner"])
        rows = torch.as_tensor(layer.token_indices[found["adapter"]], device=tensor.device)
        return _as(tensor, layer.get_base_layer().weight[rows])
    return tensor


def _as(like: Tensor, value: Tensor) -> Tensor:
    return value.detach().to(like)
