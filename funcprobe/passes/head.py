"""Hidden states -> (log-probability, entropy) of every response token, and their derivatives.

If the output embedding is frozen (`Forward.readout`), no [T, V] tensor outlives a chunk of tokens:
`readout.py` has all derivatives in closed form. Otherwise, for instance if the embedding is trained,
plain operations are differentiated, `PLAIN_CHUNK` tokens at a time.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp, vjp

from ..autodiff.taylor import second_jvp
from ..autodiff.transforms import Constants, derivatives, in_transform
from ..policy import readout
from ..policy.blocks import placed
from ..policy.forward import Forward
from ..types import Params

PLAIN_CHUNK = 256


def token_head(
    params: Params, hidden_TD: Float[Tensor, "T D"], target_T: Int[Tensor, " T"], forward: Forward
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """l = log p(target), h = -sum_u p(u) log p(u), nats, in float32 at least.

    Differentiable any number of times with torch.func. A single derivative in the hidden state keeps
    two rows per token; nested ones keep [T, V] tensors. Autograd's double backward, which the forward
    cannot anticipate, raises RuntimeError if the embedding is frozen.
    """
    target_T = placed(target_T, hidden_TD.device)
    nested = derivatives(hidden_TD)
    if forward.readout is None or nested > 1:
        chunks = _chunks(hidden_TD, target_T)
        outs = _joined([_plain(params, z_nD, y_n, forward) for z_nD, y_n in chunks])
    elif nested == 0:
        outs = readout.values(hidden_TD, target_T, forward.readout)
    else:
        outs = _Rows.apply(hidden_TD, target_T, Constants(forward.readout))  # type: ignore[no-untyped-call]
    return outs[0], outs[1]


def head_gradient(
    params: Params,
    hidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    p_T: Float[Tensor, " T"],
    q_T: Float[Tensor, " T"],
    forward: Forward,
) -> tuple[Float[Tensor, "T D"], list[Params]]:
    """d/dz of sum (p l + q h), p and q held fixed, and its gradients in the head's parameters.

    The latter are a list to be summed, empty if the head has no parameters. Creates no graph.
    """
    p_T, q_T, target_T = (placed(x, hidden_TD.device) for x in (p_T, q_T, target_T))
    if forward.readout is not None:
        with torch.no_grad():
            return readout.weighted_row(hidden_TD, target_T, p_T, q_T, forward.readout), []
    rows, grads = [], []
    for hidden_nD, target_n, p_n, q_n in _chunks(hidden_TD, target_T, p_T, q_T):
        head = partial(_plain, target_T=target_n, forward=forward)
        (logp_n, entropy_n), pull = vjp(head, params, hidden_nD)  # type: ignore[misc]
        with torch.no_grad():  # else the pullback records an unused graph
            grad, row_nD = pull((p_n.to(logp_n), q_n.to(entropy_n)))
        rows.append(row_nD)
        grads.append(grad)
    return torch.cat(rows), grads


def head_tangents(
    params: Params,
    hidden_TD: Float[Tensor, "T D"],
    dhidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    direction: Params,
    forward: Forward,
) -> tuple[Float[Tensor, " T"], ...]:
    """(l, h, l', h') with tangents `direction` of the parameters, `dhidden_TD` of the hidden states."""
    target_T = placed(target_T, hidden_TD.device)
    with torch.no_grad():
        if forward.readout is not None:
            return readout.along(hidden_TD, dhidden_TD, target_T, forward.readout)
        outs = []
        for hidden_nD, dhidden_nD, target_n in _chunks(hidden_TD, dhidden_TD, target_T):
            head = partial(_plain, target_T=target_n, forward=forward)
            value, tangent = jvp(head, (params, hidden_nD), (direction, dhidden_nD))  # type: ignore[misc]
            outs.append((*value, *tangent))
    return _joined(outs)


def head_second_tangents(
    params: Params,
    jet: tuple[Float[Tensor, "T D"], Float[Tensor, "T D"], Float[Tensor, "T D"]],
    target_T: Int[Tensor, " T"],
    direction: Params,
    forward: Forward,
) -> tuple[Float[Tensor, " T"], ...]:
    """(l, h, l', h', l'', h'') from hidden states and their first two derivatives along `direction`."""
    target_T = placed(target_T, jet[0].device)
    if forward.readout is not None:
        with torch.no_grad():
            return readout.twice_along(*jet, target_T, forward.readout)
    outs, still = [], {n: torch.zeros_like(t) for n, t in direction.items()}
    for *jet_nD, target_n in _chunks(*jet, target_T):
        head = partial(_plain, target_T=target_n, forward=forward)

        value, first, second = jet_nD
        out, out1, out2 = second_jvp(head, (params, value), (direction, first), (still, second))
        outs.append((*out, *out1, *out2))
    return _joined(outs)


def _chunks(*of_T: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x_T.split(PLAIN_CHUNK) for x_T in of_T), strict=True)


def _joined(outs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*outs, strict=True))


class _Rows(torch.autograd.Function):
    """(l, h) with the rows dl/dz and dh/dz, which make every first derivative a dot product."""

    @staticmethod
    def forward(hidden_TD: Tensor, target_T: Tensor, constants: Constants) -> tuple[Tensor, ...]:
        return readout.rows(hidden_TD, target_T, *constants.values)

    @staticmethod
    def vmap(info: Any, in_dims: Any, hidden: Tensor, target: Tensor, constants: Constants) -> Any:
        # Explicit, as the values are written in place: tokens are independent, a batch adds tokens.
        pairs = zip((hidden, target), in_dims, strict=False)
        full = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in pairs
        ]
        outs = _Rows.apply(*(x.flatten(0, 1) for x in full), constants)  # type: ignore[no-untyped-call]
        return tuple(out.unflatten(0, (info.batch_size, -1)) for out in outs), (0, 0, 0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, dlogp_TD, dentropy_TD = output
        ctx.mark_non_differentiable(dlogp_TD, dentropy_TD)
        ctx.save_for_backward(dlogp_TD, dentropy_TD)
        ctx.save_for_forward(dlogp_TD, dentropy_TD)
        ctx.autograd = not in_transform(inputs[0])

    @staticmethod
    def backward(ctx: Any, glogp_T: Tensor, gentropy_T: Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.autograd and torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph = True through the head would silently omit its second derivative in "
                "the hidden state: nest torch.func.grad, vjp or jvp instead"
            )
        dlogp_TD, dentropy_TD = ctx.saved_tensors
        return glogp_T[:, None] * dlogp_TD + gentropy_T[:, None] * dentropy_TD, None, None

    @staticmethod
    def jvp(ctx: Any, dhidden_TD: Tensor, *_: Any) -> tuple[Any, ...]:
        wide = torch.promote_types(dhidden_TD.dtype, torch.float32)  # as the values are
        slopes = [(row_TD.to(wide) * dhidden_TD.to(wide)).sum(-1) for row_TD in ctx.saved_tensors]
        return (*slopes, None, None)


def _plain(
    params: Params, hidden_TD: Tensor, target_T: Tensor, forward: Forward
) -> tuple[Tensor, Tensor]:
    logits_TV = forward.logits(params, hidden_TD)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    logp_TV = torch.log_softmax(logits_TV, dim=-1)
    logp_T = logp_TV.gather(-1, target_T[:, None]).squeeze(-1)
    return logp_T, -(logp_TV.exp() * logp_TV).sum(-1)
