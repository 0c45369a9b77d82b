"""The next step where dropout makes Y random: the mean of v over masks, and its spread."""

import math
from collections.abc import Sequence
from statistics import stdev
from typing import NamedTuple

from .. import tree
from ..types import AdamState, Params, Step
from . import adam
from .adam import UpdateDirection
from .response import response, response_along


class OverMasks(NamedTuple):
    """<X, v_k> of the step by each mask's gradient Y_k, v_k AdamW's own step from it.

    `spread` is the standard deviation over masks. A step has one mask: about the mean of the K here its
    derivative has the standard error `se` = spread sqrt(1 + 1/K), with K - 1 degrees of freedom.
    """

    derivative: tuple[float, ...]  # <X, v_k>
    from_update: tuple[float, ...]  # <X, P_k Y_k>
    spread: float
    se: float


def mean_direction(
    params: Params, Y_masks: Sequence[Params], adam_state: AdamState, step: Step
) -> UpdateDirection:
    """The mean of v_k, of its parts, of P_k and of the clip coefficient over the masks' gradients Y_k.

    v is not linear in Y, by the second moment and the clip: this is not v of the mean of Y_k, and the
    mean of P_k Y_k is not the product of the two means. Of one gradient it is `update_direction`.
    """
    first, *others = Y_masks
    mean = adam.update_direction(params, first, adam_state, **step._asdict())
    for count, Y in enumerate(others, start=2):  # one direction at a time: each is four adapters large
        share = 1 / count
        one = adam.update_direction(params, Y, adam_state, **step._asdict())
        mean = UpdateDirection(
            total=_towards(mean.total, one.total, share),
            momentum=_towards(mean.momentum, one.momentum, share),
            decay=_towards(mean.decay, one.decay, share),
            scale=_towards(mean.scale, one.scale, share),
            clip_coefficient=(1 - share) * mean.clip_coefficient + share * one.clip_coefficient,
        )
    return mean._replace(total={n: t.to(first[n].dtype) for n, t in mean.total.items()})


class StepParts(NamedTuple):
    """The parts of v, which sum to it, and its response to Y itself; float64, means over masks."""

    momentum: Params
    decay: Params
    update: Params  # P Y
    common: Params  # D Y, D = dv/dY: dv/dw of a common weight w of all of U in J


def parts(params: Params, Y_masks: Sequence[Params], adam_state: AdamState, step: Step) -> StepParts:
    """v_momentum, v_decay, P_k Y_k and D_k Y_k of `update_direction`, means over the gradients Y_k."""
    mean: StepParts | None = None
    for count, Y in enumerate(Y_masks, start=1):
        given = step._asdict()
        one = adam.update_direction(params, Y, adam_state, **given)
        update = {n: p * tree.f64(Y[n]) for n, p in one.scale.items()}
        common = response_along(params, Y, Y, adam_state, **given)
        each = StepParts(one.momentum, one.decay, update, common)
        old = each if mean is None else mean
        mean = StepParts(*(_towards(a, b, 1 / count) for a, b in zip(old, each, strict=True)))
    assert mean is not None  # at least one gradient
    return mean


def mean_response(
    X: Params, params: Params, Y_masks: Sequence[Params], adam_state: AdamState, step: Step
) -> Params:
    """D^T X with D the mean over masks of dv_k / dY_k; of one gradient it is `response`.

    A change Z of every Y_k, as of gradients without masks, changes <X, mean of v_k> by <D^T X, Z>.
    """
    first, *others = Y_masks
    mean = response(params, X, first, adam_state, **step._asdict())
    for count, Y in enumerate(others, start=2):
        mean = _towards(mean, response(params, X, Y, adam_state, **step._asdict()), 1 / count)
    return mean


def over_masks(
    X: Params, params: Params, Y_masks: Sequence[Params], adam_state: AdamState, step: Step
) -> OverMasks:
    """The derivative along v_k for every mask's gradient Y_k, at least two."""
    derivative, from_update = [], []
    for Y in Y_masks:
        one = adam.update_direction(params, Y, adam_state, **step._asdict())
        derivative.append(tree.dot(X, one.total))
        from_update.append(tree.dot(tree.multiply(one.scale, X), Y))
    spread = stdev(derivative)
    return OverMasks(
        tuple(derivative), tuple(from_update), spread, spread * math.sqrt(1 + 1 / len(Y_masks))
    )


def clip_response(from_update: Sequence[float], Y_masks: Sequence[Params], step: Step) -> float:
    """What clipping takes from the mean of <X, P_k Y_k> for a change dY of all Y_k, per <mean Y, dY>.

    A clipped gradient is divided by |Y_k| + 1e-6: what a prompt adds to |Y_k|, <Y_k, dY> / |Y_k|, it
    takes from the others. There the mean of Y_k stands for Y_k, as dY is without masks. 0 where no Y_k
    is clipped.
    """
    taken = [0.0]
    for part, Y in zip(from_update, Y_masks, strict=True):
        norm = tree.norm(Y)
        if step.rule == "adamw" and norm and adam.clip_coefficient(Y, step.max_grad_norm) < 1:
            taken.append(part / (norm * (norm + adam.CLIP_EPS)))
    return sum(taken) / len(Y_masks)


def _towards(a: Params, b: Params, share: float) -> Params:
    """a + share (b - a), in float64."""
    return {n: tree.f64(t).lerp(tree.f64(b[n]), share) for n, t in a.items()}
