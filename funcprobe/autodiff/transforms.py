"""How torch's transforms wrap a tensor: whether, and how many times, it is differentiated."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..types import InputError, Params


class Constants:
    """Hides tensors from an autograd.Function, which would otherwise compute tangents for them."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def in_transform(tensor: Tensor) -> bool:
    """Whether the tensor is wrapped by torch.func, inside grad, vjp, jvp or vmap."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def derivatives(tensor: Tensor) -> int:
    """Number of nested derivatives taken of a tensor: torch.func's levels, autograd, a dual level."""
    count, inner = 0, tensor
    while in_transform(inner):
        # A level that tracks no gradient is vmap's.
        count += torch._C._functorch.is_gradtrackingtensor(inner)
        inner = torch._C._functorch.get_unwrapped(inner)
    count += inner.requires_grad and torch.is_grad_enabled()
    # Inside a transform the dual level is the transform's own, counted above.
    return count + (inner is tensor and forward_ad.unpack_dual(tensor).tangent is not None)


def refuse_differentiated(*given: Params) -> None:
    """InputError for parameters that a surrounding transform differentiates, which vmap does not.

    For functions that return derivatives: they keep no graph, so that a derivative of their result
    would silently be zero.
    """
    with torch.no_grad():  # autograd is not counted: it raises an error itself without a graph
        differentiated = any(derivatives(t) for params in given for t in params.values())
    if differentiated:
        raise InputError(
            "a torch.func transform differentiates a derivative, which keeps no graph, so that the "
            "result would be zero: differentiate token_stats or seq_logprobs instead"
        )
