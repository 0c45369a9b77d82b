"""<grad f_n, mu> of every sequence, and the gradient of the sum of f_n, from one backward pass."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import tree
from ..autodiff.replaced import Replaced
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS, Layout, gather, response_mask
from ..policy.rows import Rows
from ..ranks import added
from ..types import Batch, Params
from .gradients import accumulate, on_cpu, unlayered, weighted_grad, zero_gradient
from .head import head_gradient
from .microbatches import over_microbatches
from .pullback import by_layer
from .tangents import aligned, tangents


def grad_dots(
    params: Params,
    batch: Batch,
    mu: Params,
    forward: Forward,
    max_tokens: int = MAX_TOKENS,
    *,
    p_NR: Float[Tensor, "N R"] | None = None,
    q_NR: Float[Tensor, "N R"] | None = None,
) -> tuple[Float[Tensor, " N"], Params]:
    """s_n = <grad f_n, mu> in float64, and grad sum_n f_n, f_n = sum_k (p_nk l_nk + q_nk h_nk).

    By default f_n = S_n, the log-probability of the response. A linear layer y = W x, with the gradient
    g_t of y at token t, contributes sum_t <g_t, mu_W x_t> over a sequence's tokens to s_n, so that one
    backward pass gives both. Prompts are not shared, as the g of a shared token would mix sequences. If
    anything but linear layers of the backbone is trained (embeddings, norms, the head), and in half
    precision, s_n comes from a second pass, `tangents`. Raises ValueError if `mu` does not match
    `params`, RuntimeError if sum_n s_n is not <grad, mu>, which is checked in every microbatch.
    """
    params, mu = aligned(params, mu, "mu")
    p_NR = response_mask(batch).double() if p_NR is None else p_NR
    q_NR = torch.zeros_like(p_NR) if q_NR is None else q_NR
    # In half precision, rounding would hide the errors that the check of the sum is for.
    if torch.finfo(forward.coarsest).eps < 1e-4:
        found = _in_one_pass(params, batch, mu, p_NR, q_NR, forward, max_tokens)
        if found is not None:
            return found
    _, along = tangents(params, batch, mu, forward, max_tokens)
    s_N = (p_NR * along.logp_NR + q_NR * along.entropy_NR).sum(1)
    return s_N, weighted_grad(params, batch, p_NR, q_NR, forward, max_tokens)


def _in_one_pass(
    params: Params,
    batch: Batch,
    mu: Params,
    p_NR: Tensor,
    q_NR: Tensor,
    forward: Forward,
    max_tokens: int,
) -> tuple[Float[Tensor, " N"], Params] | None:
    """None if a trained parameter has another use than in linear layers, on any rank."""

    def one(rows: Rows, recompute: bool = forward.recompute) -> tuple[Params, Tensor]:
        # Plain autograd: torch.func.vjp would wrap every call of _LinearDot, a fifth of the cost.
        given: Params = {n: nn.Parameter(t) for n, t in params.items()}
        like = next(iter(params.values()))
        alpha_NL = nn.Parameter(like.new_zeros(rows.tokens_NL.shape))  # of a token: of its sequence
        with torch.enable_grad(), by_layer(recompute):
            hidden_TD = _hidden(given, alpha_NL, rows, mu, forward)
        p_T, q_T = gather(p_NR, rows), gather(q_NR, rows)
        at_TD = hidden_TD.detach()
        grad_TD, _ = head_gradient(params, at_TD, rows.target_T, p_T, q_T, forward)
        *found, s_NL = torch.autograd.grad(hidden_TD, [*given.values(), alpha_NL], grad_TD)
        grads = dict(zip(given, found, strict=True))
        index_NL = rows.sequence_NL.to(s_NL.device)
        s_n = s_NL.new_zeros(len(rows.sequence_T.unique()))
        s_n = tree.f64(s_n.index_add(0, index_NL.flatten(), s_NL.flatten()))
        _require_sum(s_n, grads, mu)
        return grads, s_n

    start = zero_gradient(params)
    names = sorted(start)

    def add(so_far: list[Tensor], rows: Rows, found: tuple[Params, Tensor]) -> list[Tensor]:
        grads, s_n = found
        s_N, *total = so_far
        s_N = s_N.index_copy(0, rows.sequence_T.unique(), s_n)
        both = accumulate(dict(zip(names, total, strict=True)), grads)
        return [s_N, *both.values()]

    so_far = [torch.zeros(len(p_NR), dtype=torch.float64), *(start[n] for n in names)]
    layout: Layout = "plain" if forward.layout == "plain" else "packed"

    def smaller() -> Callable[[Rows], tuple[Params, Tensor]] | None:
        return None if unlayered(params, forward) else partial(one, recompute=True)

    other_use = torch.zeros(1)
    try:
        so_far, _ = over_microbatches(one, add, so_far, batch, max_tokens, forward, layout, smaller)
    except _OtherUseError:  # raised by the first microbatch
        other_use += 1
    if bool(forward.ranks.add([other_use])[0]):  # all ranks go the same way
        return None
    s_N, *total = so_far
    grads = dict(zip(names, total, strict=True))
    return forward.ranks.add([s_N])[0], on_cpu(added(grads, forward.ranks))


class _OtherUseError(Exception):
    """A trained parameter is not the weight or bias of a linear layer over a microbatch's tokens."""


class _LinearDots(Replaced):
    """Every trained linear layer y = W x + b becomes y + alpha_n (mu_W x + mu_b) at alpha = 0."""

    def __init__(self, given: Params, mu: Params, alpha_NL: Tensor) -> None:
        super().__init__({linear: self._linear})
        self.name_of = {id(tensor): name for name, tensor in given.items()}
        self.mu, self.reads = mu, (alpha_NL,)
        self.alpha_on = cache(partial(_on, alpha_NL))  # the devices of a split model
        self.seen: set[str] = set()
        self.shapes: set[tuple[int, ...]] = set()  # of the trained layers' inputs, without the width

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        names = [self.name_of.get(id(tensor)) for tensor in (weight, bias)]
        self.seen |= {name for name in names if name is not None}
        self.shapes |= set() if names == [None, None] else {tuple(input.shape[:-1])}
        if names == [None, None]:
            return linear(input, weight, bias)
        mu = tuple(None if name is None else self.mu[name] for name in names)
        out: Tensor = _LinearDot.apply(input, weight, bias, self.alpha_on(input.device), mu)  # type: ignore[no-untyped-call]
        return out


def _on(alpha_NL: Tensor, device: torch.device) -> Tensor:
    with torch.enable_grad():  # first needed, perhaps, in a layer's first computation
        return alpha_NL.to(device)


class _LinearDot(torch.autograd.Function):
    """W x + b; the gradient in alpha_NL, which does not enter it, is <g_t, mu_W x_t + mu_b>.

    This takes one more narrow product, merged with one of W's: with W x if W has fewer outputs than
    inputs, else with W^T g.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        alpha_NL: Tensor,  # noqa: ARG004
        mu: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        ctx.mu, moved, count = mu, None, len(weight)
        narrows = mu[0] is not None and count <= weight.shape[1]
        if mu[0] is not None and narrows:
            out, moved = linear(x, torch.cat([weight, mu[0]])).split([count, count], -1)
            out = out.clone() if bias is None else out + bias
        else:
            out = linear(x, weight, bias)
        ctx.save_for_backward(x, weight, moved)
        y: Tensor = out
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, moved = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        mu_weight, mu_bias = ctx.mu
        back: Tensor | None = None
        dot_NL = g.new_zeros(()) if mu_bias is None else g @ mu_bias
        if mu_weight is None or moved is not None:
            back = g @ weight if of_x else None
            dot_NL = dot_NL if moved is None else dot_NL + (g * moved).sum(-1)
        else:
            back, of_mu = (g @ torch.cat([weight, mu_weight], 1)).chunk(2, -1)
            dot_NL = dot_NL + (of_mu * x).sum(-1)
        g_SD = g.flatten(0, -2)
        return (
            back,
            g_SD.T @ x.flatten(0, -2) if of_weight else None,
            g_SD.sum(0) if of_bias else None,
            dot_NL,
            None,
        )


def _hidden(
    given: Params, alpha_NL: Tensor, rows: Rows, mu: Params, forward: Forward
) -> Float[Tensor, "T D"]:
    with _LinearDots(given, mu, alpha_NL) as mode:
        hidden_TD: Tensor = forward.hidden(given, rows)
    # Some models flatten or select tokens, so that the sequence of each is unknown.
    if mode.seen != given.keys() or mode.shapes != {tuple(rows.tokens_NL.shape)}:
        raise _OtherUseError
    return hidden_TD


def _require_sum(s_n: Tensor, grads: Params, mu: Params) -> None:
    whole, size = _dot(grads, mu), float(s_n.abs().sum())
    gap = abs(float(s_n.sum()) - whole)
    eps = max(torch.finfo(t.dtype).eps for t in grads.values())
    bound = 1e3 * eps * (size + abs(whole))  # rounding of a long sum
    if gap <= bound:  # the norms below take as long as all of this
        return
    # If the terms cancel, rounding is that of terms as large as the product of the norms.
    if not gap <= bound + 10 * eps * math.sqrt(_dot(grads, grads) * _dot(mu, mu)):
        raise RuntimeError(
            f"<grad f_n, mu> of the sequences sum to {float(s_n.sum()):.6g}, not to <grad, mu> = "
            f"{whole:.6g}: a trained weight is used outside linear layers; use tangents()"
        )


def _dot(a: Params, b: Params) -> float:
    """tree.dot on the device of the first tensor, for which the host waits once."""
    parts = [(a[name].double() * b[name].double()).sum() for name in sorted(a)]
    return math.fsum(tree.f64(torch.stack([x.to(parts[0].device) for x in parts])).tolist())
