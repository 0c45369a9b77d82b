"""Rules that add a term to J: an entropy bonus, a penalty of the KL divergence to a reference."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..tree import f64
from ..types import InputError, UpdateBatch
from .rule import ROUNDING, Rule, RuleInputs, required

Estimate: TypeAlias = Literal["k2", "k3"]


def entropy_bonus(coef: float) -> Rule:
    """d += coef * unit: J + coef H, with H the entropies of U's tokens averaged as J averages tokens.

    coef per nat; negative, it is a penalty. TRL's `entropy_coef` and verl's `entropy_coeff`, whose H is
    the mean over all tokens where the unit is that of "token_mean".
    InputError if the run has a bonus of its own that is divided by another sum than c.
    """

    def rule(inputs: RuleInputs) -> UpdateBatch:
        update = inputs.update
        if coef == 0:
            return update
        d_NR = coef * torch.where(inputs.mask_NR, inputs.unit_NR, 0.0)
        if update.entropy_coef_NR is not None:
            _require_same_divisor(update)
            d_NR = update.entropy_coef_NR + d_NR
        return update._replace(entropy_coef_NR=d_NR, entropy_normaliser_N=update.normaliser_N)

    return rule


def kl_penalty(coef: float, estimate: Estimate) -> Rule:
    """c -= coef * unit * d KL / d l, with x = l - l_ref of a sampled token, nats.

        k3:  KL = exp(-x) - 1 + x,  d KL / d l = 1 - exp(-x)     GRPO, arXiv:2402.03300, equation 4
        k2:  KL = x**2 / 2,         d KL / d l = x

    The derivative of k2 has the gradient of KL(p || p_ref) as its mean over samples of p; TRL's k3 with
    `use_bias_correction_kl` has the derivative x too where the ratio is 1. Source: Schulman 2020,
    "Approximating KL divergence"; TRL's `beta`, verl's `kl_loss_coef` with `kl_loss_type`.
    """

    def rule(inputs: RuleInputs) -> UpdateBatch:
        ref_NR = required(inputs, "ref_logp_NR", "kl_penalty")
        x_NR = torch.where(inputs.mask_NR, inputs.stats.logp_NR - ref_NR, 0.0)
        slope_NR = x_NR if estimate == "k2" else -torch.expm1(-x_NR)
        coef_NR = inputs.update.coef_NR - coef * inputs.unit_NR * slope_NR
        _require_finite(coef_NR, x_NR)
        return inputs.update._replace(coef_NR=torch.where(inputs.mask_NR, coef_NR, 0.0))

    return rule


def _require_same_divisor(update: UpdateBatch) -> None:
    ours_N, theirs_N = update.entropy_normaliser_N, update.normaliser_N
    if ours_N is None or theirs_N is None:
        return
    ours_N, theirs_N = (f64(x_N) / f64(x_N).sum() for x_N in (ours_N, theirs_N))
    if bool(((ours_N - theirs_N).abs() > ROUNDING * theirs_N).any()):
        raise InputError(
            "entropy_bonus adds to a bonus of the run's own that has another divisor than its policy "
            "term, and J would need both: raise the coefficient in the configured loss instead"
        )


def _require_finite(coef_NR: Tensor, x_NR: Tensor) -> None:
    if bool((bad_NR := ~coef_NR.isfinite()).any()):
        where = bad_NR.nonzero()[0].tolist()
        raise InputError(
            f"kl_penalty: the token at {where} has l - l_ref = {float(x_NR[tuple(where)]):g} nats: "
            'k3 overflows, use the estimate "k2"'
        )
