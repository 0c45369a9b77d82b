"""Derivatives along one direction: of every token (forward mode), of every sequence (alpha trick)."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import tree
from ..autodiff.forward_mode import ForwardMode
from ..autodiff.transforms import in_transform, refuse_differentiated
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS, collate, gather, response_mask
from ..policy.rows import Rows
from ..policy.trials import attempt
from ..types import Batch, InputError, Params, TokenStats
from .head import head_gradient, head_tangents, token_head
from .microbatches import over_microbatches, per_token


def tangents(
    params: Params, batch: Batch, direction: Params, forward: Forward, max_tokens: int = MAX_TOKENS
) -> tuple[TokenStats, TokenStats]:
    """(l, h) and (l', h') = d/d eta of l and h at theta + eta * direction, eta = 0, [N, R] each.

    As in torch.func.jvp, values come first, bit-identical to `token_stats`, then their tangents; in
    nats and nats per unit of eta. One forward-mode pass; no graph is kept, so that memory does not grow
    with the batch. Raises ValueError if `direction` has other names or shapes than `params`, InputError
    inside a transform that differentiates either.
    """
    params, direction = aligned(params, direction)

    def one(rows: Rows) -> tuple[Tensor, ...]:
        hidden_TD, dhidden_TD = hidden_along(params, rows, direction, forward)
        return head_tangents(params, hidden_TD, dhidden_TD, rows.target_T, direction, forward)

    logp, entropy, dlogp, dentropy = per_token(one, 4, batch, max_tokens, forward)
    return TokenStats(logp, entropy), TokenStats(dlogp, dentropy)


def alpha_vjp(
    params: Params,
    batch: Batch,
    mu: Params,
    forward: Forward,
    max_tokens: int = MAX_TOKENS,
    *,
    p_NR: Float[Tensor, "N R"] | None = None,
    q_NR: Float[Tensor, "N R"] | None = None,
    alpha_N: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """s_i = <grad f_i, mu> for every sequence at once, f_i = sum_k (p_ik l_ik + q_ik h_ik).

    The reverse-over-reverse counterpart of `tangents`: h(alpha) = <d/d theta sum_i alpha_i f_i, mu> is
    linear in alpha, and s = dh/d alpha is the vjp of a vjp, without per-sequence gradients. dh/d alpha
    is taken at `alpha_N` (default ones), on which the result must not depend. By default f_i = S_i, the
    log-probability of the response, in nats. A double backward pass holds all activations: with
    `forward.recompute`, and where memory runs out on a single sequence, s_i is summed from the tangents
    of its tokens instead, which is the same number. Raises ValueError if `mu` does not match `params`,
    InputError inside a transform that differentiates either.
    """
    params, mu = aligned(params, mu, "mu")
    p_NR = response_mask(batch).double() if p_NR is None else p_NR
    q_NR = torch.zeros_like(p_NR) if q_NR is None else q_NR
    alpha_N = torch.ones(len(p_NR)).double() if alpha_N is None else alpha_N

    def one(rows: Rows) -> Tensor:
        sequence_n, index_T = rows.sequence_T.unique(return_inverse=True)
        p_T, q_T = gather(p_NR, rows), gather(q_NR, rows)
        # The fused attention kernels have no double backward (pytorch #117629).
        with sdpa_kernel(SDPBackend.MATH):
            pull, row = _pullback(params, rows, p_T, q_T, forward)

            def dot(alpha_n: Tensor) -> Float[Tensor, ""]:
                """h(alpha) = <d/d theta sum_i alpha_i f_i, mu>."""
                alpha_T = alpha_n[index_T].to(row)
                (grads,) = pull(alpha_T.view(-1, *[1] * (row.dim() - 1)) * row)
                dots = [(grads[name] * mu[name]).sum() for name in params]
                return torch.stack([x.to(dots[0].device) for x in dots]).sum()

            h, pull_alpha = vjp(dot, alpha_N[sequence_n])  # type: ignore[misc]
            with torch.no_grad():
                (s_n,) = pull_alpha(torch.ones_like(h))
        return tree.f64(s_n)

    def by_tangents(rows: Rows) -> Tensor:
        hidden = hidden_along(params, rows, mu, forward)
        *_, dlogp_T, dentropy_T = head_tangents(params, *hidden, rows.target_T, mu, forward)
        sequence_n, index_T = rows.sequence_T.unique(return_inverse=True)
        terms_T = gather(p_NR, rows) * tree.f64(dlogp_T) + gather(q_NR, rows) * tree.f64(dentropy_T)
        return terms_T.new_zeros(len(sequence_n)).index_add(0, index_T, terms_T)

    def add(s: list[Tensor], rows: Rows, s_n: Tensor) -> list[Tensor]:
        return [s[0].index_copy(0, rows.sequence_T.unique(), s_n)]

    start = [torch.zeros(len(p_NR), dtype=torch.float64)]
    compute = by_tangents if forward.recompute else one
    (s_N,), _ = over_microbatches(
        compute, add, start, batch, max_tokens, forward, smaller=lambda: by_tangents
    )
    return forward.ranks.add([s_N])[0]


def require_derivatives(params: Params, forward: Forward) -> None:
    """InputError unless the model has forward-mode and second derivatives, tested on five tokens.

    And unless reverse and forward mode agree: a forward with torch.no_grad inside has two derivatives.
    """
    batch = collate([[0]], [[1, 0, 0, 1]], [0])  # attention to equal tokens alone has no derivative

    def both() -> tuple[float, float, float]:
        stats, along = tangents(params, batch, params, forward)
        by_reverse = float(alpha_vjp(params, batch, params, forward).sum())
        size = along.logp_NR.abs().sum() + stats.logp_NR.abs().sum() / 1e4
        return by_reverse, float(along.logp_NR.sum()), float(size)

    found = attempt(both)
    if isinstance(found, str):
        raise InputError(f"torch.func cannot differentiate this architecture: {found}")
    by_reverse, by_forward, size = found
    # Some hundred roundings and what curvature makes of them; half precision would hide anything.
    eps = torch.finfo(forward.coarsest).eps
    if eps < 1e-4 and not abs(by_reverse - by_forward) <= 1e4 * eps * size:
        raise InputError(
            f"this architecture's gradient is not that of its logits: along theta {by_reverse:.6g} by "
            f"reverse mode, {by_forward:.6g} by forward mode (its forward may stop gradients)"
        )


def hidden_along(
    params: Params, rows: Rows, direction: Params, forward: Forward
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
    """Hidden states and their tangents; by torch.func.jvp, which wraps every tensor, in a transform."""
    with torch.no_grad(), ForwardMode():
        if any(in_transform(t) for t in params.values()):
            hidden_TD, dhidden_TD = jvp(partial(forward.hidden, rows=rows), (params,), (direction,))  # type: ignore[misc]
            return hidden_TD, dhidden_TD
        with forward_ad.dual_level():
            given = {n: forward_ad.make_dual(t, direction[n]) for n, t in params.items()}
            hidden_TD, dhidden_TD = forward_ad.unpack_dual(forward.hidden(given, rows))
            if dhidden_TD is None:  # no parameter of the backbone is trained
                dhidden_TD = torch.zeros_like(hidden_TD)
    return hidden_TD, dhidden_TD


def _pullback(
    params: Params, rows: Rows, p_T: Tensor, q_T: Tensor, forward: Forward
) -> tuple[Callable[[Tensor], tuple[Params]], Tensor]:
    """A linear map to gradients, and x such that it takes alpha_t x_t to d/d theta sum_t alpha_t f_t.

    f_t = p_t l_t + q_t h_t. If only the backbone is trained, the map is its pullback and x are the rows
    d f_t / d hidden_t, [T, D], in closed form; else x are ones, [T].
    """
    if forward.readout is not None:
        hidden_TD, pull = vjp(partial(forward.hidden, rows=rows), params)  # type: ignore[misc]
        row_TD, _ = head_gradient(params, hidden_TD, rows.target_T, p_T, q_T, forward)
        return pull, row_TD

    def f(given: Params) -> Float[Tensor, " T"]:
        logp_T, entropy_T = token_head(given, forward.hidden(given, rows), rows.target_T, forward)
        return p_T.to(logp_T) * logp_T + q_T.to(logp_T) * entropy_T

    f_T, pull = vjp(f, params)  # type: ignore[misc]
    return pull, torch.ones_like(f_T)


def aligned(params: Params, direction: Params, what: str = "direction") -> tuple[Params, Params]:
    """Both with sorted names, and the direction in the dtypes and on the devices of the parameters.

    A registry is a dict by name, in any order; torch's jvp and vjp require one order, and `tree`
    returns the sorted one. Raises ValueError for other names or shapes, InputError if a surrounding
    transform differentiates either.
    """
    tree.require_same(params, direction, what)
    refuse_differentiated(params, direction)
    params = dict(sorted(params.items()))
    return params, {n: direction[n].to(dtype=t.dtype, device=t.device) for n, t in params.items()}
