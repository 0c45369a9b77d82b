"""What a rule reads of U, and what it returns: J with other coefficients."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..types import InputError, ResponseMask, TokenStats, UpdateBatch

# A coefficient that was divided and multiplied again is off by a few units in the last place.
ROUNDING = 1e-12


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

SUPPLIES: dict[str, str] = {
    "reward_N": "rewards of U: responses with the column reward, or a reward function",
    "old_logp_NR": "log-probabilities at the policy that sampled U: responses with the column old_logp",
    "ref_logp_NR": "log-probabilities at the reference policy: responses with the column ref_logp",
    "share_NR": "shares of the prediction by token, from funcprobe.attribute",
    "marginal_NR": "marginals of the prediction by token, from funcprobe.attribute",
}
"""The optional inputs, and what supplies them."""


def touched(rule: UpdateBatch, own: UpdateBatch, mask_NR: ResponseMask) -> float:
    """Share of the tokens of `mask_NR` whose coefficients are not the run's own, to rounding."""
    zero_NR = torch.zeros_like(own.coef_NR)
    d_NR, own_d_NR = (zero_NR if u.entropy_coef_NR is None else u.entropy_coef_NR for u in (rule, own))
    differs_NR = _differs(rule.coef_NR, own.coef_NR) | _differs(d_NR, own_d_NR)
    return float(differs_NR[mask_NR].double().mean())


def required(inputs: RuleInputs, name: str, needed_by: str) -> Tensor:
    """An optional input, float64, 0 off the mask; InputError if None, or not finite on the mask."""
    found: Any = getattr(inputs, name)
    if found is None:
        raise InputError(f"{needed_by} needs {name}, which is None: supply {SUPPLIES[name]}")
    kept = inputs.mask_NR if found.ndim == 2 else torch.ones_like(found, dtype=torch.bool)
    if bool((bad := kept & ~found.isfinite()).any()):
        where = bad.nonzero()[0].tolist()
        raise InputError(
            f"{needed_by} needs {name}, which is {float(found[tuple(where)])} at {where}, expected a "
            f"finite number: supply {SUPPLIES[name]}"
        )
    return torch.where(kept, found, 0.0).double()


def reweighted(update: UpdateBatch, weight_NR: Tensor, bonus: bool) -> UpdateBatch:
    """J with every token's c times its weight, and d too where `bonus`; the divisors are those of J.

    Coefficients that are 0 stay so, whatever the weight there.
    """

    def times(x_NR: Tensor) -> Tensor:
        return torch.where(x_NR == 0, x_NR, x_NR * weight_NR)

    coef_NR, d_NR = times(update.coef_NR), update.entropy_coef_NR
    if bonus and d_NR is not None:
        return update._replace(coef_NR=coef_NR, entropy_coef_NR=times(d_NR))
    return update._replace(coef_NR=coef_NR)


def _differs(x_NR: Tensor, own_NR: Tensor) -> Tensor:
    return (x_NR - own_NR).abs() > ROUNDING * torch.maximum(x_NR.abs(), own_NR.abs())
