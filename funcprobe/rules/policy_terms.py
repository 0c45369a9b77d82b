"""Rules that papers and trainers change the policy term of a token by.

They act on c; an entropy bonus of the run's own, in d, is left as it is. Where a rule weights tokens it
multiplies the run's own c, a KL penalty in it included, and its divisors stay those of J: a token of
weight 0 counts in them as before, as in the sources. Where a trainer chooses tokens within each of its
micro-batches, here they are chosen among all tokens of U.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from ..losses import trl_terms
from ..losses.verl_policy import Call, token_losses
from ..losses.verl_settings import VerlLoss
from ..types import UpdateBatch
from .rule import Rule, RuleInputs, required, reweighted

PROBABILITY_FLOOR = 1e-8  # STEER's, of p and 1 - p
METRIC_FLOOR = 0.02  # STEER's, of the largest |Omega|


def own() -> Rule:
    """J as the run has it."""
    return lambda inputs: inputs.update


def positive_only() -> Rule:
    """c of tokens with A > 0 alone: positive sample reinforcement (PSR, arXiv:2506.01347).

    The paper parts responses by a reward of 1 or -1, here the sign of A does: with `mean` and like
    advantages, that of the reward against its group's.
    """
    return lambda inputs: reweighted(inputs.update, inputs.advantage_NR > 0, bonus=False)


def negative_only() -> Rule:
    """c of tokens with A < 0 alone: negative sample reinforcement (NSR, arXiv:2506.01347).

    By the sign of A, as in `positive_only`.
    """
    return lambda inputs: reweighted(inputs.update, inputs.advantage_NR < 0, bonus=False)


def weighted_reinforce(weight: float) -> Rule:
    """c times `weight` where A > 0: `weight` PSR + NSR, 0.1 in the paper (arXiv:2506.01347)."""

    def rule(inputs: RuleInputs) -> UpdateBatch:
        A_NR = inputs.advantage_NR
        weight_NR = torch.ones_like(A_NR).masked_fill(A_NR > 0, weight)
        return reweighted(inputs.update, weight_NR, bonus=False)

    return rule


def clip(low: float, high: float) -> Rule:
    """c = -unit d/dl [-min(r A, clip(r, 1 - low, 1 + high) A)], r = exp(l - l_old).

    That is A r unit, and 0 where r > 1 + high and A > 0, or r < 1 - low and A < 0; of a tie torch's
    subgradient. Clipping of PPO (arXiv:1707.06347, equation 7), with two bounds as in DAPO
    (arXiv:2503.14476, section 3.1: low 0.2, high 0.28); the function is that of TRL's losses.
    """

    def rule(inputs: RuleInputs) -> UpdateBatch:
        old_NR = required(inputs, "old_logp_NR", "clip")
        A_NR = inputs.advantage_NR

        def loss(l_NR: Tensor) -> Tensor:
            r_NR = torch.where(inputs.mask_NR, l_NR - old_NR, 0.0).exp()
            return trl_terms.clipped(r_NR, r_NR, A_NR, 1 - low, 1 + high)

        return _policy_gradient(inputs, loss)

    return rule


def clip_cov(ratio: float) -> Rule:
    """PPO's clipped term without `ratio` of the tokens, those of 1 < cov < 5, chosen at random.

    cov = (A - mean A) (l - mean l). The token counts times `ratio`, at least one, are dropped; as the
    draw cannot be known, every candidate counts with the probability that it is kept, which is the
    expectation of c over the draw. Clip-Cov (arXiv:2505.22617), of verl 0.9.1 with its defaults:
    ratio 0.0002, clip range 0.2. Without old log-probabilities r = 1.
    """
    return _of_verl(VerlLoss(loss_mode="clip_cov", clip_cov_ratio=ratio), needs_old=False)


def kl_cov(ratio: float, coef: float) -> Rule:
    """c = unit (A r - coef sign(l - l_old)) for `ratio` of the tokens, the largest cov; else A r unit.

    KL-Cov (arXiv:2505.22617), of verl 0.9.1 with its defaults: ratio 0.0002, at least one token, and
    coef 0.1. At l = l_old the derivative of |l - l_old| is 0, so that the rule needs an old policy.
    """
    settings = VerlLoss(loss_mode="kl_cov", kl_cov_ratio=ratio, ppo_kl_coef=coef)
    return _of_verl(settings, needs_old=True)


def top_entropy(share: float) -> Rule:
    """c of the tokens whose entropy is at least the (1 - share) quantile; 0 for the others.

    Wang et al. 2025 (arXiv:2506.01939: the upper 20 %), by TRL's `top_entropy_quantile`, whose
    divisors are those of all tokens. An entropy bonus, which TRL restricts to the same tokens, is left.
    """

    def rule(inputs: RuleInputs) -> UpdateBatch:
        one_batch_N = torch.zeros(len(inputs.mask_NR), dtype=torch.int64)
        h_NR = inputs.stats.entropy_NR
        kept_NR = trl_terms.high_entropy(h_NR, inputs.mask_NR, one_batch_N, share)
        return reweighted(inputs.update, kept_NR, bonus=False)

    return rule


def steer(smallest: float) -> Rule:
    """c times w = exp(-k |Omega|), k = -log(smallest) / max(max |Omega|, 0.02); max over the tokens.

        Omega = A / p_old * p (1 - p) (log p + h)

    STEER (arXiv:2510.10150) with its exponential weights, as in its code (zz-haooo/STEER at b31df71,
    `compute_token_weights`, linear=False with smallest = 0.8 as in its script): the largest |Omega|
    has weight `smallest` if it is 0.02 or more. p and 1 - p are at least 1e-8.
    """

    def weights(omega_NR: Tensor, mask_NR: Tensor) -> Tensor:
        largest = max(float(omega_NR[mask_NR].max()), METRIC_FLOOR)
        return (math.log(smallest) / largest * omega_NR).exp().clamp(smallest, 1.0)

    return _steered(weights)


def steer_linear(smallest: float, largest: float) -> Rule:
    """c times w, linear in |Omega| of `steer`, `largest` at its minimum, `smallest` at its maximum.

    STEER's linear weights (arXiv:2510.10150; linear=True in its code, 0.8 and 1.2). Equal |Omega| give
    the mean of both.
    """

    def weights(omega_NR: Tensor, mask_NR: Tensor) -> Tensor:
        least, most = omega_NR[mask_NR].min(), omega_NR[mask_NR].max()
        if bool(most == least):
            return torch.full_like(omega_NR, (smallest + largest) / 2)
        falls_NR = (omega_NR - least) * ((largest - smallest) / (most - least))
        return (largest - falls_NR).clamp(smallest, largest)

    return _steered(weights)


def stare(raised: float, share: float) -> Rule:
    """c times `raised` for the `share` of the tokens with A > 0 that have the largest surprisal -l.

    STARE's default, one-sided variant O1 (arXiv:2606.19236), as in its code (hp-luo/STARE at bffb9e7,
    `compute_stare_token_weights`: raised 1.1, share 0.1 rounded up), with its gate on: the paper sets
    all weights to 1 while the entropy of the batch is at least a target, 0.3 nats.
    """
    return stare_two_sided(raised, 1.0, share)


def stare_two_sided(raised: float, lowered: float, share: float) -> Rule:
    """`stare`, and c times `lowered` for that share of the tokens with A < 0, by surprisal too.

    STARE's variant C2 (arXiv:2606.19236; 1.1, 0.9 and 0.1 in its code), with its gate on.
    """

    def rule(inputs: RuleInputs) -> UpdateBatch:
        A_NR, surprisal_NR = inputs.advantage_NR, -inputs.stats.logp_NR
        weight_NR = torch.ones_like(surprisal_NR)
        for weight, candidate_NR in ((raised, A_NR > 0), (lowered, A_NR < 0)):
            top_NR = _largest(surprisal_NR, candidate_NR & inputs.mask_NR, share)
            weight_NR = torch.where(top_NR, weight, weight_NR)
        return reweighted(inputs.update, weight_NR, bonus=False)

    return rule


def _steered(weights: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    def rule(inputs: RuleInputs) -> UpdateBatch:
        p_NR = inputs.stats.logp_NR.exp().clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        old_NR = inputs.stats.logp_NR
        if inputs.old_logp_NR is not None:
            old_NR = required(inputs, "old_logp_NR", "steer")
        f_NR = p_NR * (1 - p_NR) * (p_NR.log() + inputs.stats.entropy_NR)
        omega_NR = inputs.advantage_NR / old_NR.exp().clamp(PROBABILITY_FLOOR, 1.0) * f_NR
        if not bool(inputs.mask_NR.any()):
            return inputs.update
        return reweighted(inputs.update, weights(omega_NR.abs(), inputs.mask_NR), bonus=False)

    return rule


def _of_verl(settings: VerlLoss, needs_old: bool) -> Rule:
    def rule(inputs: RuleInputs) -> UpdateBatch:
        mask_NR = inputs.mask_NR
        old_NR = inputs.stats.logp_NR
        if needs_old or inputs.old_logp_NR is not None:
            old_NR = required(inputs, "old_logp_NR", settings.loss_mode)
        old_NR, A_NR = (torch.where(mask_NR, x_NR, 0.0) for x_NR in (old_NR, inputs.advantage_NR))

        def loss(l_NR: Tensor) -> Tensor:
            call = Call(torch.where(mask_NR, l_NR, 0.0), old_NR, A_NR, mask_NR)
            return token_losses(settings, call)[0]

        return _policy_gradient(inputs, loss)

    return rule


def _policy_gradient(inputs: RuleInputs, loss: Callable[[Tensor], Tensor]) -> UpdateBatch:
    """J with c = -unit d loss / d l on the mask, in place of the run's own."""
    unit_NR = torch.where(inputs.mask_NR, inputs.unit_NR, 0.0)
    slope_NR = grad(lambda l_NR: (unit_NR * loss(l_NR)).sum())(inputs.stats.logp_NR)
    return inputs.update._replace(coef_NR=torch.where(inputs.mask_NR, -slope_NR, 0.0))


def _largest(x_NR: Tensor, candidate_NR: Tensor, share: float) -> Tensor:
    """The `share` of the candidates with the largest x, their number rounded up as STARE does."""
    count = int(candidate_NR.sum())
    if count == 0 or share == 0:
        return torch.zeros_like(candidate_NR)
    number = min(max(1, int(count * share + 0.999999)), count)
    top = torch.topk(x_NR[candidate_NR], number).indices
    at = candidate_NR.flatten().nonzero()[:, 0][top]
    flat = torch.zeros(candidate_NR.numel(), dtype=torch.bool).index_fill(0, at, True)
    return flat.reshape(candidate_NR.shape)
