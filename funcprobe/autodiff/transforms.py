"""What torch's transforms have made of a tensor: whether, and how often, it is differentiated."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..types import InputError, Params


class Constants:
    """Keeps tensors out of sight of an autograd.Function, which would make tangents of them."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def in_transform(tensor: Tensor) -> bool:
    """Whether the tensor is one of torch.func's, inside grad, vjp, jvp or vmap."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def derivatives(tensor: Tensor) -> int:
    """How many nested derivatives go through a tensor: torch.func's levels, autograd, a dual level."""
    count, inner = 0, tensor
    while in_transform(inner):
        # Else this level is vmap's.
        count += torch._C._functorch.is_gradtrackingtensor(inner)
        inner = torch._C._functorch.get_unwrapped(inner)
    count += inner.requires_grad and torch.is_grad_enabled()
    # Inside a transform the dual level is its own, and counted.
    return count + (inner is tensor and forward_ad.unpack_dual(tensor).tangent is not None)


def refuse_differentiated(*given: Params) -> None:
    """InputError for parameters that a transform around differentiates; vmap is none.

    For functions that are derivatives themselves: they keep no graph, so that grad around them would
    find zeros.
    """
    with torch.no_grad():  # autograd itself says where there is no graph
        differentiated = any(derivatives(t) for params in given for t in params.values())
    if differentiated:
        raise InputError(
            "a transform differentiates what is a derivative itself and keeps no graph: "
            "differentiate token_stats or seq_logprobs instead"
        )
