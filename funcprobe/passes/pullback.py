"""Gradients in the hidden states -> in the registry, with the activations of all layers or of one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp

from ..autodiff.transforms import in_transform
from ..policy.forward import Forward
from ..policy.layers import LayerByLayer, NotLayeredError
from ..policy.rows import Rows
from ..types import InputError, Params


def pullback(
    params: Params, rows: Rows, forward: Forward, *, recompute: bool
) -> tuple[Float[Tensor, "T D"], Callable[[Tensor], Params]]:
    """hidden_TD, and g_TD -> d/d theta of sum_t <g_t, hidden_t>, which may be called once.

    Raises NotLayeredError if its layers are to be computed again and cannot be, InputError for the same
    inside a transform of torch.func.
    """
    if any(in_transform(t) for t in params.values()):
        if recompute:
            raise InputError("inside a transform of torch.func, gradients cannot recompute layers")
        return _by_vjp(params, rows, forward)
    # Plain autograd: torch.func.vjp wraps every tensor, and allows no function of our own in layers.
    given: Params = {n: nn.Parameter(t) for n, t in params.items()}
    with torch.enable_grad(), by_layer(recompute):
        hidden_TD = forward.hidden(given, rows)

    def pull(grad_TD: Tensor) -> Params:
        if not hidden_TD.requires_grad:  # no parameter of the backbone is trained
            return {n: torch.zeros_like(t) for n, t in params.items()}
        found = torch.autograd.grad(hidden_TD, list(given.values()), grad_TD, materialize_grads=True)
        return dict(zip(given, found, strict=True))

    return hidden_TD.detach(), pull


@contextmanager
def by_layer(recompute: bool) -> Iterator[None]:
    """LayerByLayer for a forward, if asked for; NotLayeredError if no layer was called in it."""
    if not recompute:
        yield
        return
    with LayerByLayer() as mode:
        yield
    if not mode.layers:
        raise NotLayeredError("its backbone does not call its layers")


def _by_vjp(params: Params, rows: Rows, forward: Forward) -> tuple[Tensor, Callable[[Tensor], Params]]:
    hidden_TD, of_grad = vjp(partial(forward.hidden, rows=rows), params)  # type: ignore[misc]

    def pull(grad_TD: Tensor) -> Params:
        with torch.no_grad():  # else the pullback records an unused graph
            (grads,) = of_grad(grad_TD)
        return grads  # type: ignore[no-any-return]

    return hidden_TD, pull
