"""What a gradient does beyond its own step: Adam's first moment carries it into later ones."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ..step.adam import groups_by_name
from ..types import AdamState, Step

BELOW_HALF_ULP = 2.0**-54  # of 1: 1 - x is 1 in float64


class Lifetime(NamedTuple):
    """<X, P Y> in the step itself, and what the same gradient adds through momentum in later steps."""

    now: float
    later: float
    factor: float | None  # later / now of any part of Y; None: it differs between tensors

    @property
    def total(self) -> float:
        return self.now + self.later


def later_factors(adam_state: AdamState, step: Step = Step()) -> dict[str, float]:
    """For every tensor, what a gradient does through momentum in all later steps, over its own step.

    The gradient of step t + 1 enters that step with f_0 and the one j steps later with f_j,

        f_j = (1 - beta1) beta1^j / (1 - beta1^(t+1+j))
        sum_{j>=1} f_j / f_0 = (1 - beta1^(t+1)) sum_{j>=1} beta1^j / (1 - beta1^(t+1+j))

    which tends to beta1 / (1 - beta1) as t grows, if the second moment with its bias correction, X, the
    learning rate and the clip coefficient stay as they are. 0 for a rule without momentum. From the
    recursion of Adam (Kingma and Ba, arXiv:1412.6980).
    """
    if step.rule != "adamw":
        return {name: 0.0 for group in adam_state.groups for name in group.names}
    kinds = {n: (g.beta1, adam_state.step[n] + 1) for n, g in groups_by_name(adam_state).items()}
    factor = {kind: _later(*kind) for kind in set(kinds.values())}
    return {name: factor[kind] for name, kind in kinds.items()}


def lifetime(
    update_by_tensor: Mapping[str, float], adam_state: AdamState, step: Step = Step()
) -> Lifetime:
    """The batch's part of the prediction now and later, from <X, P Y> of every tensor.

    `update_by_tensor` is `update` of the parts in `ModuleShares.tensor`. The share of a token, sequence
    or prompt acts later with `factor` times itself, if all tensors have one beta1 and one step; else
    it needs a pass along P X times `later_factors`.
    """
    factors = later_factors(adam_state, step)
    later = math.fsum(factors[name] * share for name, share in update_by_tensor.items())
    kinds = {factors[name] for name in update_by_tensor}
    return Lifetime(
        now=math.fsum(update_by_tensor.values()),
        later=later,
        factor=kinds.pop() if len(kinds) == 1 else None,
    )


def _later(beta1: float, step: int) -> float:
    """sum_{j>=1} f_j / f_0, `step` the number of the step that the gradient is of."""
    if beta1 == 0:
        return 0.0
    terms, power, correction = [], beta1, beta1 ** (step + 1)
    while correction >= BELOW_HALF_ULP:
        terms.append(power / (1 - correction))
        power, correction = power * beta1, correction * beta1
    terms.append(power / (1 - beta1))  # the rest, a geometric series without bias correction
    return (1 - beta1**step) * math.fsum(terms)
