"""Gradients with respect to the registry, microbatch by microbatch, in reverse mode."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from . import tree
from .evaluation import evaluate, gradient_coefficients
from .head import chunks, token_head
from .layout import MAX_TOKENS, gather, microbatches
from .logprobs import token_stats
from .policy import Forward
from .types import Batch, Entropy, Params, UpdateBatch


def weighted_grad(
    params: Params,
    batch: Batch,
    p_NR: Float[Tensor, "N R"],
    q_NR: Float[Tensor, "N R"],
    forward: Forward,
    max_tokens: int = MAX_TOKENS,
) -> Params:
    """d/d theta of sum_ik (p_ik l_ik + q_ik h_ik), the coefficients held fixed.

    Accumulated over microbatches on the CPU, in float32 (float64 where a parameter is float64).
    The head's pullback is taken a chunk at a time, so that its [tokens, V] part never exists whole.
    """
    total = tree.zeros(params)
    total = {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in total.items()}
    for rows in microbatches(batch, max_tokens):
        hidden_TD, pull_backbone = vjp(partial(forward.hidden, rows=rows), params)  # type: ignore[misc]
        p_T, q_T = gather(p_NR, rows), gather(q_NR, rows)
        grad_TD = torch.zeros_like(hidden_TD)
        for c in chunks(len(p_T)):
            head = partial(token_head, target_T=rows.target_T[c], forward=forward)
            (logp_T, entropy_T), pull_head = vjp(head, params, hidden_TD[c].detach())  # type: ignore[misc]
            with torch.no_grad():  # else the pullback records a graph nobody will use
                grads, grad_TD[c] = pull_head((p_T[c].to(logp_T), q_T[c].to(entropy_T)))
            total = _accumulate(total, grads)
        with torch.no_grad():
            (grads,) = pull_backbone(grad_TD)
        total = _accumulate(total, grads)
    return total


def grad_X(
    params: Params, batch: Batch, entropy: Entropy, forward: Forward, max_tokens: int = MAX_TOKENS
) -> Params:
    """X = d/d theta of the entropy estimator on E (two passes: coefficients, then gradient).

    <X, v> is the derivative of the estimator along v, as `estimators.first_order` has it by tangents.
    """
    stats = token_stats(params, batch, forward, max_tokens)
    p_NR, q_NR = gradient_coefficients(evaluate(batch, stats, entropy))
    return weighted_grad(params, batch, p_NR, q_NR, forward, max_tokens)


def grad_Y(
    params: Params, update: UpdateBatch, forward: Forward, max_tokens: int = MAX_TOKENS
) -> Params:
    """Y = d/d theta of J = sum_mk c_mk l_mk on U: the policy gradient, the direction of ascent."""
    zero_NR = torch.zeros_like(update.coef_NR)
    return weighted_grad(params, update.batch, update.coef_NR, zero_NR, forward, max_tokens)


def _accumulate(total: Params, part: Params) -> Params:
    return {n: t + part[n].to(device=t.device, dtype=t.dtype) for n, t in total.items()}
