"""Gradients with respect to the registry, microbatch by microbatch, in reverse mode."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from .. import tree
from ..autodiff.transforms import refuse_differentiated
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS, gather
from ..policy.rows import Rows
from ..ranks import added
from ..statistics.evaluation import evaluate, gradient_coefficients
from ..types import Batch, Entropy, Params, UpdateBatch
from .head import head_gradient
from .logprobs import token_stats
from .microbatches import in_microbatches


def weighted_grad(
    params: Params,
    batch: Batch,
    p_NR: Float[Tensor, "N R"],
    q_NR: Float[Tensor, "N R"],
    forward: Forward,
    max_tokens: int = MAX_TOKENS,
) -> Params:
    """d/d theta of sum_ik (p_ik l_ik + q_ik h_ik), the coefficients held fixed.

    Accumulated over microbatches on the parameters' device, in float32 (float64 where a parameter is
    float64), and returned on the CPU. As p and q are known, the head takes two products and no
    [tokens, V] tensor exists as a whole. Raises InputError inside a transform that differentiates
    `params`, as all derivatives here do.
    """
    refuse_differentiated(params)
    total = zero_gradient(params)

    def one(rows: Rows) -> list[Params]:
        hidden_TD, pull = vjp(partial(forward.hidden, rows=rows), params)  # type: ignore[misc]
        p_T, q_T = gather(p_NR, rows), gather(q_NR, rows)
        grad_TD, grads = head_gradient(params, hidden_TD, rows.target_T, p_T, q_T, forward)
        with torch.no_grad():  # else the pullback records an unused graph
            return [*pull(grad_TD), *grads]

    for _, grads in in_microbatches(one, batch, max_tokens, forward):
        for part in grads:
            total = accumulate(total, part)
    return on_cpu(added(total, forward.ranks))


def grad_X(
    params: Params, batch: Batch, entropy: Entropy, forward: Forward, max_tokens: int = MAX_TOKENS
) -> Params:
    """X = d/d theta of the entropy estimator on E (two passes: coefficients, then gradient).

    <X, v> is the derivative of the estimator along v, which `estimators.first_order` computes from
    tangents. In nats per token or per sequence, per unit of each parameter. Raises InputError where
    `weighted_grad` and `baselines.baseline` do.
    """
    stats = token_stats(params, batch, forward, max_tokens)
    p_NR, q_NR = gradient_coefficients(evaluate(batch, stats, entropy))
    return weighted_grad(params, batch, p_NR, q_NR, forward, max_tokens)


def grad_Y(
    params: Params, update: UpdateBatch, forward: Forward, max_tokens: int = MAX_TOKENS
) -> Params:
    """Y = d/d theta of J = sum_mk c_mk l_mk + d_mk h_mk on U, the direction of ascent.

    Without a pass if every coefficient is 0. Raises InputError where `weighted_grad` does.
    """
    if not update.moves:
        return on_cpu(zero_gradient(params))
    c_NR, d_NR = update.coef_NR, update.entropy_coef_NR
    d_NR = torch.zeros_like(c_NR) if d_NR is None else d_NR
    return weighted_grad(params, update.batch, c_NR, d_NR, forward, max_tokens)


def zero_gradient(params: Params) -> Params:
    """Zeros in which gradients accumulate: float32, or float64 where a parameter is.

    On the parameters' device: copying every microbatch's gradient to the CPU would make a GPU wait for
    each of its tensors.
    """

    def zeros(t: Tensor) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        return torch.zeros(t.shape, dtype=wide, device=t.device)

    return tree.tree_map(zeros, params)


def accumulate(total: Params, part: Params) -> Params:
    """total + part, on the device and in the dtype of `total`."""
    return {n: t + part[n].to(device=t.device, dtype=t.dtype) for n, t in total.items()}


def on_cpu(total: Params) -> Params:
    """The same on the CPU, where what follows is arithmetic in float64."""
    return {n: t.cpu() for n, t in total.items()}
