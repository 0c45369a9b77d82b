"""The derivative of the next step with respect to its gradient, and its transpose."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..types import AdamGroup, AdamState, Params, Rule
from . import adam
from .adam import UpdateDirection


def response(
    params: Params,
    X: Params,
    grads: Params,
    adam_state: AdamState,
    *,
    rule: Rule = "adamw",
    max_grad_norm: float | None = None,
    max_update: float | None = None,
) -> Params:
    """D^T X, D = dv/dY of `update_direction` at Y = `grads`: d/de <X, v(Y + e Z)> = <D^T X, Z>, e = 0.

    With c the clip coefficient, t steps taken, and entrywise products,

        A = P - (v_momentum + P Y) s / (sqrt(nu_hat) + eps)
        s = d sqrt(nu_hat) / dY = c^2 (1 - beta2) Y / ((1 - beta2^(t+1)) sqrt(nu_hat))
        D^T X = A X - kappa Y <Y, A X>,    kappa = 1 / (|Y| (|Y| + 1e-6)) if c < 1, else 0

    for "adamw": P held fixed, less what the second moment takes, less what clipping takes, a term of
    rank one by which D is not symmetric. s is 0 where nu_hat is, the mean of its one-sided limits. For
    "precondition" it is P X, 0 for entries at `max_update`; for "sgd" X, with the groups' ratios of
    learning rates. The derivative of torch.optim.AdamW's equations (Loshchilov and Hutter,
    arXiv:1711.05101) and of torch.nn.utils.clip_grad_norm_. In the unit of <X, v> per unit of Y;
    float64 on the CPU. Raises as `update_direction`; ValueError if X has other names or shapes.
    """
    tree.require_same(params, X, "X")
    bounds = {"max_grad_norm": max_grad_norm, "max_update": max_update}
    D = _derivative(params, grads, adam_state, rule, **bounds)
    along = {n: a * tree.f64(X[n]) for n, a in D.diagonal.items()}
    return tree.axpy(-D.kappa * tree.dot(grads, along), grads, along) if D.kappa else along


def response_along(
    params: Params,
    Z: Params,
    grads: Params,
    adam_state: AdamState,
    *,
    rule: Rule = "adamw",
    max_grad_norm: float | None = None,
    max_update: float | None = None,
) -> Params:
    """D Z = d/de v(Y + e Z) at e = 0, Y = `grads`: A Z - kappa A Y <Y, Z>, with A, kappa of `response`.

    With Z = Y it is the answer to a common weight of all tokens of U: <X, D Y> is the sum of their
    marginals. In the unit of v; float64 on the CPU. Raises as `update_direction`; ValueError if Z has
    other names or shapes.
    """
    tree.require_same(params, Z, "Z")
    bounds = {"max_grad_norm": max_grad_norm, "max_update": max_update}
    D = _derivative(params, grads, adam_state, rule, **bounds)
    clipped = D.kappa * tree.dot(grads, Z) if D.kappa else 0.0
    return {n: a * (tree.f64(Z[n]) - clipped * tree.f64(grads[n])) for n, a in D.diagonal.items()}


class _Derivative(NamedTuple):
    """D = A (1 - kappa Y Y^T), A diagonal."""

    diagonal: Params  # A
    kappa: float  # 0 where Y is not clipped


def _derivative(
    params: Params,
    grads: Params,
    adam_state: AdamState,
    rule: Rule,
    max_grad_norm: float | None,
    max_update: float | None,
) -> _Derivative:
    bounds = {"max_grad_norm": max_grad_norm, "max_update": max_update}
    direction = adam.update_direction(params, grads, adam_state, rule=rule, **bounds)
    diagonal = direction.scale
    if rule == "adamw":
        diagonal = _adamw_diagonal(grads, direction, adam_state)
    elif rule == "precondition" and max_update is not None:
        unbounded, _ = adam.preconditioner(params, adam_state)
        diagonal = {
            n: torch.where(unbounded[n] * tree.f64(grads[n]).abs() > max_update, 0.0, p)
            for n, p in diagonal.items()
        }
    if direction.clip_coefficient == 1:
        return _Derivative(diagonal, 0.0)
    norm = tree.norm(grads)
    return _Derivative(diagonal, 1 / (norm * (norm + adam.CLIP_EPS)))


def _adamw_diagonal(grads: Params, direction: UpdateDirection, adam_state: AdamState) -> Params:
    group_of = adam.groups_by_name(adam_state)
    clip = direction.clip_coefficient

    def one(name: str, group: AdamGroup) -> Tensor:
        step, Y = adam_state.step[name] + 1, tree.f64(grads[name])
        nu_hat = adam.next_nu_hat(clip * Y, adam_state.exp_avg_sq[name], group, step)
        per_root = torch.where(nu_hat > 0, nu_hat.rsqrt(), 0.0)
        slope = clip**2 * (1 - group.beta2) / (1 - group.beta2**step) * Y * per_root
        moving = tree.f64(direction.momentum[name]) + direction.scale[name] * Y
        return direction.scale[name] - moving * slope / (nu_hat.sqrt() + group.eps)

    return {name: one(name, group_of[name]) for name in grads}
