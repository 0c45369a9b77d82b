"""Gradients with respect to the registry, microbatch by microbatch, in reverse mode."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from .. import tree
from ..autodiff.transforms import refuse_differentiated
from ..policy.forward import Forward
from ..policy.layers import NotLayeredError
from ..policy.layout import MAX_TOKENS, collate, gather, microbatches, response_mask
from ..policy.rows import Rows
from ..policy.trials import attempt
from ..ranks import added
from ..statistics.evaluation import evaluate, gradient_coefficients
from ..types import Batch, Entropy, Params, UpdateBatch
from .head import head_gradient
from .logprobs import token_stats
from .microbatches import over_microbatches
from .pullback import pullback


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
    [tokens, V] tensor exists as a whole. With `forward.recompute`, and where memory runs out on a
    single sequence, layers are computed again one at a time (policy/layers.py). Raises InputError
    inside a transform that differentiates `params`, as all derivatives here do.
    """
    refuse_differentiated(params)

    def one(rows: Rows, recompute: bool = forward.recompute) -> list[Params]:
        return _of_rows(params, rows, p_NR, q_NR, forward, recompute=recompute)

    def smaller() -> Callable[[Rows], list[Params]] | None:
        return None if unlayered(params, forward) else partial(one, recompute=True)

    names = sorted(params)

    def add(total: list[Tensor], _: Rows, grads: list[Params]) -> list[Tensor]:
        for part in grads:
            total = _plus(total, [part[n] for n in names])
        return total

    start = zero_gradient(params)
    zeros = [start[n] for n in names]
    total, _ = over_microbatches(one, add, zeros, batch, max_tokens, forward, smaller=smaller)
    return on_cpu(added(dict(zip(names, total, strict=True)), forward.ranks))


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


def unlayered(params: Params, forward: Forward) -> str | None:
    """Why gradients of this model cannot recompute its layers; None if they can.

    Found with three short responses, whose gradient must be that without recomputation.
    """
    batch = collate([[0, 1], [0, 1], [1]], [[1, 0, 0, 1], [0, 1, 1], [0, 1]], [0, 0, 1])
    p_NR = response_mask(batch).double()

    def gradient(recompute: bool) -> Params:
        total = zero_gradient(params)
        for rows in microbatches(batch, MAX_TOKENS, forward.layout):
            for part in _of_rows(params, rows, p_NR, -p_NR, forward, recompute=recompute):
                total = accumulate(total, part)
        return on_cpu(total)

    def both() -> tuple[Params, Params]:
        return gradient(False), gradient(True)

    try:
        found = attempt(both)
    except NotLayeredError as error:
        return error.why
    if isinstance(found, str):
        return found
    plain, again = found
    difference, size = tree.norm(tree.axpy(-1.0, plain, again)), tree.norm(plain)
    eps = torch.finfo(forward.coarsest).eps
    # As in `rounding`: half precision would hide anything behind more than a few units.
    if not difference <= (4 if eps > 1e-4 else 1000) * eps * size:
        return (
            "a layer reads or keeps more than it is given: gradients differ by "
            f"{difference:.2g}, of {size:.2g}"
        )
    return None


def _of_rows(
    params: Params,
    rows: Rows,
    p_NR: Float[Tensor, "N R"],
    q_NR: Float[Tensor, "N R"],
    forward: Forward,
    *,
    recompute: bool,
) -> list[Params]:
    """The gradient of one microbatch, in parts that are to be added."""
    hidden_TD, pull = pullback(params, rows, forward, recompute=recompute)
    p_T, q_T = gather(p_NR, rows), gather(q_NR, rows)
    grad_TD, grads = head_gradient(params, hidden_TD, rows.target_T, p_T, q_T, forward)
    return [pull(grad_TD), *grads]


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
    found = _plus(list(total.values()), [part[n] for n in total])
    return dict(zip(total, found, strict=True))


def _plus(total: list[Tensor], part: list[Tensor]) -> list[Tensor]:
    pairs = zip(total, part, strict=True)
    return [t + x.to(device=t.device, dtype=t.dtype) for t, x in pairs]


def on_cpu(total: Params) -> Params:
    """The same on the CPU, where what follows is arithmetic in float64."""
    return {n: t.cpu() for n, t in total.items()}
