"""What a rule reads of U, and what it returns: J with other coefficients."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..types import ResponseMask, TokenStats, UpdateBatch


class RuleInputs(NamedTuple):
    """U at theta, as rules read it; per-token arrays [N, R] are 0 past the end of a response.

    `unit_NR` is what a token of advantage 1 counts in J: c = advantage * unit of a plain policy
    gradient, the weight at which a bonus or penalty of coefficient 1 enters, too.
    """

    update: UpdateBatch  # the run's own coefficients
    stats: TokenStats  # l and h at theta, nats
    mask_NR: ResponseMask  # tokens that J counts
    advantage_NR: Float[Tensor, "N R"]
    unit_NR: Float[Tensor, "N R"]
    reward_N: Float[Tensor, " N"] | None = None
    old_logp_NR: Float[Tensor, "N R"] | None = None  # the ratios are to; None: l
    ref_logp_NR: Float[Tensor, "N R"] | None = None  # of the reference policy
    share_NR: Float[Tensor, "N R"] | None = None  # of the predicted change, per unit of eta
    marginal_NR: Float[Tensor, "N R"] | None = None  # its derivative in the token's weight


Rule: TypeAlias = Callable[[RuleInputs], UpdateBatch]
"""J under another rule. InputError where an input that it needs is None, stating how to supply it."""


def touched(rule: UpdateBatch, own: UpdateBatch, mask_NR: ResponseMask) -> float:
    """Share of the tokens of `mask_NR` whose coefficients differ from the run's own."""
    differs_NR = rule.coef_NR != own.coef_NR
    zero_NR = torch.zeros_like(own.coef_NR)
    d_NR, own_d_NR = (zero_NR if u.entropy_coef_NR is None else u.entropy_coef_NR for u in (rule, own))
    return float((differs_NR | (d_NR != own_d_NR))[mask_NR].double().mean())
