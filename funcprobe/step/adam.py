"""Adam by name: the preconditioner of the loaded state, and the exact next step of AdamW."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..types import AdamGroup, AdamState, InputError, Params, Rule

CLIP_EPS = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_


class PreconditionerInfo(NamedTuple):
    """Diagnostics of the preconditioner.

    P has the unit of 1 / gradient, so that the size of its entries says nothing about health; see
    `gradient_scale` for what does.
    """

    coverage: float  # share of tensors whose exp_avg_sq was used
    identity: tuple[str, ...]  # with P = 1: nu missing, all zero, negative or non-finite
    max_scale: float | None  # largest 1 / (sqrt(nu_hat) + eps); None: no nu was used
    min_denominator: float | None  # smallest sqrt(nu_hat) + eps
    zero_second_moments: int
    tiny_second_moments: int  # 0 < nu_hat < eps^2: eps dominates the denominator
    without_step: tuple[str, ...]  # nu used without bias correction: step missing or 0


class UpdateDirection(NamedTuple):
    """v, per unit of the first group's learning rate, and its split v = momentum + decay + P Y.

    `scale` is P, the diagonal through which the update gradient Y enters v.
    """

    total: Params
    momentum: Params
    decay: Params
    scale: Params
    clip_coefficient: float  # 1 where the gradient is not clipped


def preconditioner(params: Params, adam_state: AdamState) -> tuple[Params, PreconditionerInfo]:
    """P = 1 / (sqrt(nu_hat) + eps), nu_hat = exp_avg_sq / (1 - beta2^step).

    A tensor whose second moment is missing, all zero, negative or not finite gets P = 1. Without a
    step, or at step 0, there is no bias correction. Arithmetic in float64. Raises ValueError if a
    second moment has another shape than its parameter.
    """
    scale: Params = {}
    identity, without_step = [], []
    largest, smallest, zero, tiny = 0.0, math.inf, 0, 0
    group_of = groups_by_name(adam_state)
    for name, param in params.items():
        nu = adam_state.exp_avg_sq.get(name)
        if nu is not None and nu.shape != param.shape:
            raise ValueError(
                f"exp_avg_sq of {name} has shape {tuple(nu.shape)}, expected {tuple(param.shape)}"
            )
        if nu is None or not bool((nu.isfinite() & (nu >= 0)).all()) or not bool(nu.any()):
            identity.append(name)
            scale[name] = torch.ones(param.shape, dtype=torch.float64)
            continue
        group, step = group_of[name], adam_state.step.get(name)
        if not step:  # at 0 the correction would be 1 - beta2^0 = 0, and P = 0 or NaN
            without_step.append(name)
        nu_hat = tree.f64(nu) / (1 - group.beta2**step if step else 1.0)
        denominator = nu_hat.sqrt() + group.eps
        p = 1 / denominator
        largest, smallest = max(largest, float(p.max())), min(smallest, float(denominator.min()))
        zero += int((nu_hat == 0).sum())
        tiny += int(((nu_hat > 0) & (nu_hat < group.eps**2)).sum())
        scale[name] = p
    info = PreconditionerInfo(
        coverage=1 - len(identity) / len(params),
        identity=tuple(identity),
        max_scale=largest if len(identity) < len(params) else None,
        min_denominator=smallest if len(identity) < len(params) else None,
        zero_second_moments=zero,
        tiny_second_moments=tiny,
        without_step=tuple(without_step),
    )
    return scale, info


def precondition(grads: Params, adam_state: AdamState, max_update: float | None = None) -> Params:
    """P g, in the dtype of g, with P and errors as in `preconditioner`, |P g| at most `max_update`."""
    scale, _ = preconditioner(grads, adam_state)
    return _times(_bounded(scale, grads, max_update), grads)


def update_direction(
    params: Params,
    grads: Params,
    adam_state: AdamState,
    *,
    rule: Rule = "adamw",
    max_grad_norm: float | None = None,
    max_update: float | None = None,
) -> UpdateDirection:
    """v with theta_next = theta + lr v, for `grads` = Y = grad J (the direction of ascent).

    rule "adamw" is the exact next step of torch.optim.AdamW on the loss -J (Loshchilov and Hutter,
    arXiv:1711.05101; eps outside the root, decay decoupled, bias correction at step t + 1), after
    torch.nn.utils.clip_grad_norm_ where `max_grad_norm` is given. "precondition" is P Y, every entry at
    most `max_update` in absolute value if that is given; "sgd" is Y. A group whose lr differs from the
    first group's is scaled by the ratio. Raises InputError for "adamw" with an incomplete or non-finite
    state, and if learning rates have no ratio; ValueError if names or shapes differ.
    """
    tree.require_same(params, grads, "grads")
    require_state(params, adam_state, rule)
    ratio = _lr_ratios(params, adam_state)
    zero = {n: torch.zeros_like(g) for n, g in grads.items()}
    clip = 1.0
    if rule == "adamw":
        clip = clip_coefficient(grads, max_grad_norm)
        momentum, decay, scale = _adamw(params, grads, adam_state, clip)
    else:
        momentum, decay = zero, zero
        scale = {n: torch.ones(g.shape, dtype=torch.float64) for n, g in grads.items()}
        if rule == "precondition":
            scale, _ = preconditioner(params, adam_state)
            scale = _bounded(scale, grads, max_update)
    momentum, decay, scale = (
        {n: ratio[n] * t for n, t in part.items()} for part in (momentum, decay, scale)
    )
    total = {
        n: (tree.f64(momentum[n]) + tree.f64(decay[n]) + scale[n] * tree.f64(g)).to(g.dtype)
        for n, g in grads.items()
    }
    return UpdateDirection(total, momentum, decay, scale, clip)


def fresh_adam_state(params: Params, groups: tuple[AdamGroup, ...]) -> AdamState:
    """Adam's state before the first step: zero moments, step 0."""
    zeros = tree.zeros(params)
    return AdamState(zeros, dict(zeros), dict.fromkeys(params, 0), groups)


def _adamw(
    params: Params, grads: Params, adam_state: AdamState, clip: float
) -> tuple[Params, Params, Params]:
    momentum, decay, scale = {}, {}, {}
    group_of = groups_by_name(adam_state)
    for name, grad in grads.items():
        group, step = group_of[name], adam_state.step[name] + 1
        g = clip * tree.f64(grad)
        nu_hat = next_nu_hat(g, adam_state.exp_avg_sq[name], group, step)
        denominator = nu_hat.sqrt() + group.eps
        per_moment = 1 / ((1 - group.beta1**step) * denominator)
        # exp_avg averages the gradient of the loss, -J; v ascends J.
        momentum[name] = -group.beta1 * tree.f64(adam_state.exp_avg[name]) * per_moment
        decay[name] = -group.weight_decay * tree.f64(params[name])
        scale[name] = (1 - group.beta1) * clip * per_moment
    return momentum, decay, scale


def next_nu_hat(g: Tensor, exp_avg_sq: Tensor, group: AdamGroup, step: int) -> Tensor:
    """(beta2 exp_avg_sq + (1 - beta2) g^2) / (1 - beta2^step), g the clipped gradient of that step."""
    nu = group.beta2 * tree.f64(exp_avg_sq) + (1 - group.beta2) * g.square()
    return nu / (1 - group.beta2**step)


def require_state(params: Params, adam_state: AdamState, rule: Rule) -> None:
    """InputError if the state does not determine a step by `rule`, stating what is missing or damaged.

    Every parameter must be in one group, with learning rates that have a ratio; "adamw" needs every
    exp_avg, exp_avg_sq and step, all finite.
    """
    _lr_ratios(params, adam_state)
    if rule != "adamw":
        return
    by_name: dict[str, dict[str, Any]] = {
        "exp_avg": adam_state.exp_avg,
        "exp_avg_sq": adam_state.exp_avg_sq,
        "step": adam_state.step,
    }
    for what, found in by_name.items():
        if missing := [n for n in params if n not in found]:
            raise InputError(
                f'rule "adamw" needs {what} of every parameter, {len(missing)} of {len(params)} have '
                f'none (first: {missing[0]}): use a complete state, or rule "precondition"'
            )
    for what, moments in zip(("exp_avg", "exp_avg_sq"), adam_state[:2], strict=True):
        tree.require_same(params, {n: moments[n] for n in params}, what)
        for name in params:
            # NaN fails every comparison, so that it is rejected, too.
            lowest = 0.0 if what == "exp_avg_sq" else -math.inf
            if not bool((moments[name].isfinite() & (moments[name] >= lowest)).all()):
                raise InputError(
                    f"{what} of {name} contains a negative or non-finite number: the optimizer state "
                    'is damaged; use another checkpoint, or rule "sgd"'
                )


def _bounded(scale: Params, grads: Params, max_update: float | None) -> Params:
    """P reduced to max_update / |g| where |P g| exceeds max_update."""
    if max_update is None:
        return scale
    # At g = 0 the bound is infinite, and P g is 0.
    return {n: torch.minimum(p, max_update / tree.f64(grads[n]).abs()) for n, p in scale.items()}


def clip_coefficient(grads: Params, max_grad_norm: float | None) -> float:
    """torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6))."""
    if max_grad_norm is None:
        return 1.0
    return min(1.0, max_grad_norm / (tree.norm(grads) + CLIP_EPS))


def _lr_ratios(params: Params, adam_state: AdamState) -> dict[str, float]:
    group_of = groups_by_name(adam_state)
    if missing := [n for n in params if n not in group_of]:
        raise InputError(
            f"{missing[0]} is in no optimizer group: the state belongs to other parameters; use the "
            "optimizer state saved with this adapter"
        )
    first = next(g.lr for g in adam_state.groups if g.names)
    lrs = {n: group_of[n].lr for n in params}
    if first == 0 and any(lrs.values()):
        raise InputError(
            "the first optimizer group has learning rate 0 and another does not, so that the direction "
            "per unit of learning rate is undefined: set optimizer.lr"
        )
    return {n: lr / first if first else 1.0 for n, lr in lrs.items()}


def groups_by_name(adam_state: AdamState) -> dict[str, AdamGroup]:
    """The optimizer group of every parameter. ValueError for one that is in two."""
    group_of = {name: group for group in adam_state.groups for name in group.names}
    if len(group_of) < sum(len(group.names) for group in adam_state.groups):
        raise ValueError("a parameter is in two optimizer groups, each must be in one")
    return group_of


def _times(scale: Params, grads: Params) -> Params:
    return {n: (scale[n] * tree.f64(g)).to(g.dtype) for n, g in grads.items()}
