"""LoRA on a parameter, W + s B A, as peft puts it on fused experts and on routers, in functional form.

peft 0.21 registers a parametrization at every call, which torch.func cannot differentiate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def parameter_lora(model: nn.Module) -> Iterator[None]:
    """While active, peft's wrappers of parameters put the sum in the parameter's place themselves."""
    wrappers = [m for m in model.modules() if hasattr(m, "_activate_lora")]
    for wrapper in wrappers:
        vars(wrapper)["_activate_lora"] = partial(_activated, wrapper)
    try:
        yield
    finally:
        for wrapper in wrappers:
            del vars(wrapper)["_activate_lora"]


@contextmanager
def _activated(wrapper: Any, adapters: list[str]) -> Iterator[None]:
    parameters, name = wrapper.get_base_layer()._parameters, wrapper.parameter_name
    own = parameters[name]
    parameters[name] = _sum(own, wrapper, [a for a in adapters if a in wrapper.lora_A])
    try:
        yield
    finally:
        parameters[name] = own


def _sum(weight: Tensor, wrapper: Any, adapters: list[str]) -> Tensor:
    """W + s B A for every adapter; of E experts, E such sums."""
    for adapter in adapters:
        if wrapper.num_experts > 1:
            left, right, scale = wrapper.get_delta_factors(adapter)
            weight = torch.baddbmm(weight, left, right, alpha=scale)
        else:
            a, b = (x[adapter].weight.to(weight.dtype) for x in (wrapper.lora_A, wrapper.lora_B))
            weight = weight + (b @ a).view(weight.shape) * wrapper.scaling[adapter]
    return weight
