"""Rules that make c anew from the rewards: other advantages, other normalisations."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..step.objective import PRESETS, Advantage, Objective, advantages, coefficients
from ..tree import f64
from ..types import UpdateBatch
from .rule import Rule, RuleInputs, required


def advantage(mode: Advantage) -> Rule:
    """c = A * unit with A from U's rewards: mean, mean_std or leave_one_out, as in `advantages`."""

    def rule(inputs: RuleInputs) -> UpdateBatch:
        A_N = _advantages(inputs, mode, "advantage")
        coef_NR = torch.where(inputs.mask_NR, A_N[:, None] * inputs.unit_NR, 0.0)
        return inputs.update._replace(coef_NR=coef_NR)

    return rule


def preset(name: str, constant: float | None = None) -> Rule:
    """c = A z of `PRESETS[name]`: its advantages and its normalisation over the tokens in the mask.

    The trainers that they were read from are stated there. `constant` is the L of dr_grpo in tokens;
    None: the length of U's longest response, which verl divides by without `loss_scale_factor`.
    """
    objective = PRESETS[name]

    def rule(inputs: RuleInputs) -> UpdateBatch:
        A_N = _advantages(inputs, objective.advantage, name)
        longest = float(inputs.mask_NR.shape[1])
        z_NR = _units(inputs, objective._replace(constant=longest if constant is None else constant))
        tokens_N = f64(inputs.mask_NR.sum(1))
        adds_N = tokens_N if objective.normalisation == "token_mean" else torch.ones_like(tokens_N)
        return inputs.update._replace(coef_NR=A_N[:, None] * z_NR, normaliser_N=adds_N)

    return rule


def _advantages(inputs: RuleInputs, mode: str, needed_by: str) -> Float[Tensor, " N"]:
    reward_N = required(inputs, "reward_N", needed_by)
    return advantages(reward_N, inputs.update.batch.prompt_N, mode)  # type: ignore[arg-type]


def _units(inputs: RuleInputs, objective: Objective) -> Float[Tensor, "N R"]:
    """z of every token in the mask; a sequence without one counts as a sequence."""
    tokens_N = inputs.mask_NR.sum(1)
    counted_N, prompt_N = tokens_N.clamp(min=1), inputs.update.batch.prompt_N
    ones_N = torch.ones(len(tokens_N), dtype=torch.float64)
    z_NR = coefficients(ones_N, counted_N, prompt_N, objective.normalisation, objective.constant)
    z_N = z_NR[:, 0]  # of all tokens of a sequence
    if objective.normalisation == "token_mean":
        z_N = ones_N / tokens_N.sum().clamp(min=1)
    return torch.where(inputs.mask_NR, z_N[:, None], 0.0)
