"""The coefficient of a rule at which the predicted change of the entropy has a given value."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from scipy.optimize import brentq

from funcprobe import tree
from funcprobe.rules.named import BoundRule, NamedRule, bind
from funcprobe.rules.rule import touched
from funcprobe.step import masked
from funcprobe.step.adam import UpdateDirection
from funcprobe.types import InputError, Params, UpdateBatch

from ..console import Narrator
from ..store import Stages
from .gradient import gradients_on_U
from .rules import Given, Outcome, along, applied, outcome

LINEAR = ("entropy_bonus", "kl_penalty", "kl_penalty_k2")  # the run's coefficients plus b times others
STEPPED = ("top_entropy", "steer")  # of a share in (0, 1], with 1 the run's own rule
FINEST, COARSEST, FACTOR = 1e-3, 1e6, 4.0  # |b Y_b| / |Y| on the grid that brackets a root
SHARES = (1.0, 0.7, 0.4, 0.2, 0.1, 0.05, 0.02)  # tried first, from the run's own rule
HALVINGS = 5
NEAR = (
    1e-3  # |b Y_b| / |Y| of the difference that gives the slope: far above rounding, and nearly linear
)


class Solved(NamedTuple):
    """The coefficient nearest to the run's own rule, and what the step does there."""

    rule: BoundRule  # with the coefficient
    target: float  # predicted change of the entropy at eta
    coefficient: float
    slope: float | None  # of the predicted change in the coefficient; None: a share, found in steps
    low: float  # predicted changes over the coefficients tried
    high: float
    passes: int  # over U
    outcome: Outcome


def require_solvable(rule: NamedRule) -> None:
    """InputError unless the rule's coefficient, or its share, can be looked for."""
    if rule.name not in LINEAR + STEPPED:
        raise InputError(
            f"--with {rule.name}: it has no coefficient that can be solved for; those that have are "
            f"{', '.join(LINEAR + STEPPED)}"
        )


def solved(given: Given, rule: NamedRule, target: float, stages: Stages, narrator: Narrator) -> Solved:
    """The coefficient of a rule at which eta <X, v> is `target`, in the entropy's unit.

    For a rule of LINEAR Y(b) = Y + b Y_b, with Y_b by one gradient pass over U, and v(b), with second
    moment and clip, is arithmetic: a root is bracketed on a geometric grid outward from b = 0, and
    found by Brent's method (Brent 1973, ch. 4). For one of STEPPED every share takes a gradient pass,
    at most `len(SHARES) + HALVINGS` in all, and the nearest of those tried is the answer.

    InputError where no coefficient reaches the target, with the range that was reached: v is bounded,
    as Adam divides by the root of the second moment that includes the gradient.
    """
    by = _linear if rule.name in LINEAR else _by_steps
    return by(given, rule, target, stages, narrator)


def _linear(given: Given, rule: NamedRule, target: float, stages: Stages, narrator: Narrator) -> Solved:
    found = given.found
    plan, own, X = found.plan, found.batches.update, found.prediction.X
    part = _difference(applied(given, bind(rule, 1.0)), own)
    if not part.moves:
        raise InputError(
            f"--with {rule.name}: it adds nothing to J on U, where its coefficients are all 0: choose "
            "another rule"
        )
    Y_b = gradients_on_U(plan, found.batches._replace(update=part), stages, narrator)
    seen: dict[float, float] = {}

    def direction(b: float) -> UpdateDirection:
        Y = [tree.axpy(b, one, mine) for mine, one in _paired(found.passes.Y, Y_b)]
        return masked.mean_direction(plan.policy.params, Y, plan.adam_state, plan.step)

    def missed(b: float) -> float:
        if b not in seen:
            seen[b] = given.eta * tree.dot(X, direction(b).total)
        return seen[b] - target

    norms = [tree.norm(tree.mean(parts)) for parts in (found.passes.Y, Y_b)]
    unit = (norms[0] or 1.0) / norms[1]
    with narrator.phase("solve"):
        b = _root(missed, unit)
    low, high = min(seen.values()), max(seen.values())
    if b is None:
        raise InputError(_unreachable(rule.name, target, low, high))
    update = _plus(own, b, part)
    share = touched(update, own, given.inputs.mask_NR)
    there = along(given, f"{rule.name}:{b:.6g}", update, direction(b), share, stages, narrator)
    slope = (missed(b + NEAR * unit) - missed(b - NEAR * unit)) / (2 * NEAR * unit)
    return Solved(bind(rule, b), target, b, slope, low, high, 1, there)


def _root(missed: Callable[[float], float], unit: float) -> float | None:
    """The root nearest to 0, if one is between neighbours of the grid."""
    if missed(0.0) == 0:
        return 0.0
    last = {1: 0.0, -1: 0.0}
    for size in _grid(unit):
        for sign in (1, -1):
            inner, outer = last[sign], sign * size
            if missed(inner) * missed(outer) <= 0:
                low, high = sorted((inner, outer))
                return float(brentq(missed, low, high, xtol=1e-12 * size, rtol=1e-12))
            last[sign] = outer
    return None


def _grid(unit: float) -> Iterator[float]:
    for k in range(1 + math.ceil(math.log(COARSEST / FINEST, FACTOR))):
        yield unit * FINEST * FACTOR**k


def _by_steps(
    given: Given, rule: NamedRule, target: float, stages: Stages, narrator: Narrator
) -> Solved:
    """By bisection between two shares of which one predicts too little, the other too much."""
    found = given.found
    plan, X = found.plan, found.prediction.X
    seen: dict[float, float] = {}

    def missed(share: float) -> float:
        update = applied(given, bind(rule, share))
        Y = gradients_on_U(plan, found.batches._replace(update=update), stages, narrator)
        v = masked.mean_direction(plan.policy.params, Y, plan.adam_state, plan.step)
        seen[share] = given.eta * tree.dot(X, v.total)
        return seen[share] - target

    inner, at_inner = SHARES[0], missed(SHARES[0])
    for outer in SHARES[1:]:
        at_outer = missed(outer)
        if at_inner * at_outer <= 0:
            break
        inner, at_inner = outer, at_outer
    else:
        raise InputError(_unreachable(rule.name, target, min(seen.values()), max(seen.values())))
    for _ in range(HALVINGS):
        middle = (inner + outer) / 2
        at_middle = missed(middle)
        if at_inner * at_middle <= 0:
            outer = middle
        else:
            inner, at_inner = middle, at_middle
    best = min(seen, key=lambda share: abs(seen[share] - target))
    there = outcome(given, bind(rule, best), stages, narrator)
    low, high = min(seen.values()), max(seen.values())
    return Solved(bind(rule, best), target, best, None, low, high, len(seen), there)


def _unreachable(name: str, target: float, low: float, high: float) -> str:
    return (
        f"--solve entropy={target:g}: no argument of {name} reaches it; the predicted change is "
        f"{low:+.3e} to {high:+.3e} over those tried, as the step of one batch is bounded and momentum "
        "stays: choose a value in this range, or another rule by --with"
    )


def _paired(Y: tuple[Params, ...], Y_b: tuple[Params, ...]) -> Iterator[tuple[Params, Params]]:
    """Of each dropout mask. Without a pass over U there is one Y = 0 for all."""
    count = max(len(Y), len(Y_b))
    return zip(*(parts * count if len(parts) < count else parts for parts in (Y, Y_b)), strict=True)


def _difference(rule: UpdateBatch, own: UpdateBatch) -> UpdateBatch:
    d_NR, own_d_NR = _of_entropy(rule), _of_entropy(own)
    return own._replace(coef_NR=rule.coef_NR - own.coef_NR, entropy_coef_NR=d_NR - own_d_NR)


def _plus(own: UpdateBatch, b: float, part: UpdateBatch) -> UpdateBatch:
    return own._replace(
        coef_NR=own.coef_NR + b * part.coef_NR,
        entropy_coef_NR=_of_entropy(own) + b * _of_entropy(part),
    )


def _of_entropy(update: UpdateBatch) -> torch.Tensor:
    zero_NR = torch.zeros_like(update.coef_NR)
    return zero_NR if update.entropy_coef_NR is None else update.entropy_coef_NR
