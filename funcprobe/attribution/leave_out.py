"""What the next step would be without some of U's tokens: exact, from a gradient over these alone."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..along import Passes, require_normaliser, require_step
from ..passes.gradients import grad_Y
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS
from ..step import adam, masked
from ..step.adam import UpdateDirection
from ..types import AdamState, InputError, Params, Step, UpdateBatch
from .subset import moving_rows


class LeftOut(NamedTuple):
    """The step without a part of U, and three answers to how that changes the derivative.

    `without` - `derivative` is exact, -`share` what it would be if P were fixed, -`marginal` if the
    prediction were linear in the part's weight. Per unit of eta, in the entropy estimator's unit.
    """

    derivative: float  # <X, v> of the whole U
    without: float  # <X, v'>
    share: float  # <P X, Y_left>
    marginal: float  # <D^T X, Y_left>
    direction: UpdateDirection  # v', for `measure` at theta + eta v'

    @property
    def change(self) -> float:
        """<X, v'> - <X, v>: what leaving the part out does to the derivative."""
        return self.without - self.derivative


def leave_out(
    params: Params,
    passes: Passes,
    update: UpdateBatch,
    leaving: UpdateBatch,
    adam_state: AdamState,
    forward: Forward,
    *,
    step: Step = Step(),
    max_tokens: int = MAX_TOKENS,
    masks: Sequence[Forward] = (),
    renormalise: bool = False,
) -> LeftOut:
    """v' = v(Y - Y_left) of the whole step: one gradient over what leaves, none over what stays.

    `leaving` is the part of U from `subset`, Y_left its gradient. The second moment and the clip are
    those of Y - Y_left; all coefficients of what stays are the run's own, divisors included. With
    `renormalise` Y - Y_left is multiplied by D / (D - D_left), D the divisor of J (`normaliser_N`), as
    a trainer that had never seen the sequences would divide; what else was made of their prompts'
    groups, as advantages, stays.

    With `masks`, those of the passes' Y, each mask's Y_k loses its own part, and v' is the mean of the
    steps; share and marginal are means over masks, too, and no rows are dropped from these passes, as
    masks belong to rows. Rounding of the subtraction is that of Y: an entry that nothing but the part
    moves is left with some 1e-7 of itself in float32, not with 0.

    Raises InputError if `leaving` is no part of U, if nothing with a coefficient stays, and as
    `update_direction`; with `renormalise` also where a divisor is not known, none of it stays, or J has
    two, c's and d's, which would change by different factors.
    """
    _require_part(update, leaving)
    if bool(masks) != (len(passes.Y) > 1) or len(masks) not in (0, len(passes.Y)):
        raise InputError(
            f"the gradient Y is of {len(passes.Y)} dropout masks, {len(masks)} are given: pass the "
            "masks that the passes were made with"
        )
    factor = _divisor_ratio(update, leaving) if renormalise else 1.0
    each = masks or (forward,)
    part = leaving if masks else moving_rows(leaving)
    left = [grad_Y(params, part, one, max_tokens) for one in each]
    stays = tuple(
        tree.scale(factor, tree.axpy(-1.0, Y_left, Y)) for Y_left, Y in zip(left, passes.Y, strict=True)
    )
    direction = masked.mean_direction(params, stays, adam_state, step)
    require_step(direction, step)
    shares, marginals = zip(
        *(
            _first_order(params, passes.X, Y, Y_left, adam_state, step)
            for Y, Y_left in zip(passes.Y, left, strict=True)
        ),
        strict=True,
    )
    whole = masked.mean_direction(params, passes.Y, adam_state, step)
    return LeftOut(
        derivative=tree.dot(passes.X, whole.total),
        without=tree.dot(passes.X, direction.total),
        share=fmean(shares),
        marginal=fmean(marginals),
        direction=direction,
    )


def _first_order(
    params: Params, X: Params, Y: Params, Y_left: Params, adam_state: AdamState, step: Step
) -> tuple[float, float]:
    """<P X, Y_left> and <D^T X, Y_left> of the step from one gradient."""
    P = adam.update_direction(params, Y, adam_state, **step._asdict()).scale
    DX = masked.mean_response(X, params, [Y], adam_state, step)
    return tree.dot(tree.multiply(P, X), Y_left), tree.dot(DX, Y_left)


def _require_part(update: UpdateBatch, leaving: UpdateBatch) -> None:
    """InputError unless each coefficient of `leaving` is U's or 0, some leave and some stay."""
    stays = False
    for own_NR, left_NR in _coefficients(update, leaving):
        if left_NR.shape != own_NR.shape or bool(((left_NR != own_NR) & (left_NR != 0)).any()):
            raise InputError(
                "what leaves is no part of U: it has coefficients that are neither U's nor 0; make it "
                "with funcprobe.subset(update, prompts=...)"
            )
        stays = stays or bool((left_NR != own_NR).any())
    if not stays and update.moves:
        raise InputError(
            "everything that has a coefficient leaves U, so that no gradient is left: leave out less, "
            "or read the parts of v that need no gradient, from_momentum and from_decay"
        )


def _coefficients(update: UpdateBatch, leaving: UpdateBatch) -> list[tuple[Tensor, Tensor]]:
    pairs = [(update.coef_NR, leaving.coef_NR)]
    d_NR, left_d_NR = update.entropy_coef_NR, leaving.entropy_coef_NR
    if d_NR is not None or left_d_NR is not None:
        zero_NR = torch.zeros_like(update.coef_NR)
        pairs.append((zero_NR if d_NR is None else d_NR, zero_NR if left_d_NR is None else left_d_NR))
    return pairs


def _divisor_ratio(update: UpdateBatch, leaving: UpdateBatch) -> float:
    """D / (D - D_left), the same for c and d."""
    require_normaliser(update)
    divisors = [(update.normaliser_N, leaving.normaliser_N)]
    if update.entropy_coef_NR is not None:
        divisors.append((update.entropy_normaliser_N, leaving.entropy_normaliser_N))
    ratios = []
    for own_N, left_N in divisors:
        assert own_N is not None
        assert left_N is not None
        stays = float(own_N.sum() - left_N.sum())
        if not stays > 0:
            raise InputError(
                "nothing of the divisor of J stays, so that it cannot be made again: leave out less, "
                "or set renormalise to False"
            )
        ratios.append(float(own_N.sum()) / stays)
    if not math.isclose(min(ratios), max(ratios), rel_tol=1e-12):
        raise InputError(
            f"the divisors of c and d would change by different factors, {ratios[0]:.6g} and "
            f"{ratios[1]:.6g}, and Y is their sum: set renormalise to False"
        )
    return ratios[0]
