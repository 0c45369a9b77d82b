"""Where in E the entropy changes: the derivative of the estimator, token by token and term by term."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..statistics import baselines, estimators
from ..statistics.evaluation import Evaluation
from ..statistics.intervals import Error, delta_error
from ..statistics.weights import by_unit
from ..types import Batch, TokenStats
from .token_shares import TokenShares, token_shares


class Term(NamedTuple):
    """One term of the derivative: of every token, their sum, and its error given U."""

    token_NR: Float[Tensor, "N R"]
    derivative: float
    error: Error


class EvaluationShares(NamedTuple):
    """The derivative by tokens of E, per unit of eta; `tokens` is direct + score + control."""

    tokens: TokenShares
    prompt_se_M: Float[Tensor, " M"]  # given U, of `tokens.prompt_M`
    direct: Term  # q h': the entropy of the token's own distribution changes
    score: Term  # p l': the token becomes more or less probable, and with it the entropy after it
    control: Term  # -q rho b l': the baseline's control variate of that; 0 without a baseline


def evaluation_shares(
    at: Evaluation, tangent: TokenStats, batch: Batch, unit_N: Int[Tensor, " N"]
) -> EvaluationShares:
    """q_ij h'_ij + (p_ij - q_ij rho_ij b_ij) l'_ij of every token of E, which sum to `derivative`.

    p, q of `gradient_coefficients`, b the baseline and rho as in `baselines`; `tangent` of E along v,
    [N, R]. The score term is assigned to the token whose probability changes, so that a baseline makes
    each share less noisy, and no share lies past a response's end. With the sampled integrand h' does
    not enter, and -q l' is part of the score.

    Errors are the delta method's over the units `unit_N`: a term, or the tokens of one prompt, is the
    same estimator with the other tangents 0, in which its derivative and influence values are linear.
    For a prompt it is the error of what the prompt adds to the expectation over all draws, as large as
    the share itself if it was drawn once. Raises InputError for fewer than two units.
    """
    given = (at.mask_NR, at.entropy, at.log_ratio_NR)
    p_NR, q_NR = estimators.gradient_coefficients(at.stats, *given)
    zero_NR = torch.zeros_like(p_NR)
    of_logp = TokenStats(tangent.logp_NR, zero_NR)
    control_NR = zero_NR
    if at.baseline_NR is not None:
        control_NR = baselines.controlled_tangent(of_logp, at.baseline_NR, *given).entropy_NR
    direct, score, control = (
        _term(at, p_NR * part.logp_NR + q_NR * part.entropy_NR, part, unit_N)
        for part in (
            TokenStats(zero_NR, tangent.entropy_NR),
            of_logp,
            TokenStats(zero_NR, control_NR),
        )
    )
    whole = TokenStats(tangent.logp_NR, tangent.entropy_NR + control_NR)
    return EvaluationShares(
        token_shares(direct.token_NR + score.token_NR + control.token_NR, batch),
        _prompt_se(estimators.first_order_cells(at.stats, whole, *given), batch.prompt_N, unit_N),
        direct,
        score,
        control,
    )


def _term(
    at: Evaluation, token_NR: Float[Tensor, "N R"], part: TokenStats, unit_N: Int[Tensor, " N"]
) -> Term:
    first = estimators.first_order(at.stats, part, at.mask_NR, unit_N, at.entropy, at.log_ratio_NR)
    return Term(token_NR, first.derivative, delta_error(first.influence_N, unit_N))


def _prompt_se(
    cells: estimators.Cells, prompt_N: Int[Tensor, " N"], unit_N: Int[Tensor, " N"]
) -> Float[Tensor, " M"]:
    """Of F_m = sum_g (N'_m - R D'_m) / D, N'_m and D'_m the sums of n' and d' over prompt m.

    Its influence values are those of `first_order`, for every prompt at once:
    sum_g (1[i in m] (n'_i - R d'_i) - D'_m / D (n_i - R d_i) - F_mg d_i) / D.
    """
    n_Ng, d_Ng, dn_Ng, dd_Ng = cells
    N, D = n_Ng.sum(0), d_Ng.sum(0)
    R = N / D
    own_N = ((dn_Ng - R * dd_Ng) / D).sum(1)
    prompts, index_N = prompt_N.unique(return_inverse=True)
    dd_Mg = by_unit(dd_Ng, prompt_N)
    share_Mg = (by_unit(dn_Ng, prompt_N) - R * dd_Mg) / D
    influence_NM = -((n_Ng - R * d_Ng) / D) @ (dd_Mg / D).T - (d_Ng / D) @ share_Mg.T
    belongs_NM = index_N[:, None] == torch.arange(len(prompts))
    by_unit_UM = by_unit(influence_NM + own_N[:, None] * belongs_NM, unit_N)
    units = estimators.require_two(len(by_unit_UM))
    return (units / (units - 1) * by_unit_UM.square().sum(0)).sqrt()
