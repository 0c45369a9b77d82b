"""Functions of the response as observables: E[f] by the entropy's estimator with another integrand.

For f(x, y) of the whole response the self-normalised estimate at theta', from samples at theta, is

    sum_i w_i f_i / sum_i w_i,    w_i = exp(sum_j l_ij(theta') - l_ij(sampled))

and its derivative along v at theta' = theta is Cov(f, S') over E, with S' = sum_j l'_j: the entropy per
sequence with sequence weights, in which f stands at the first position and 0 at the others. Influence
values, standard errors, diagnostics of the weights and coefficients of the gradient are thus those of
`estimators`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..policy.layout import response_mask
from ..types import Batch, Entropy, InputError, TokenStats
from . import evaluation
from .estimators import FirstOrder, Measured
from .evaluation import Evaluation


def of_response(
    batch: Batch,
    stats: TokenStats,
    f_N: Float[Tensor, " N"],
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    clip: float | None = None,
) -> Evaluation:
    """The observable f, one number a response, on E at theta; `stats` are E's, [N, R] in nats.

    `evaluation.value` and `evaluation.gradient_coefficients` of the result are those of E[f], in the
    unit of f. Raises InputError unless f is finite.
    """
    if not bool(f_N.isfinite().all()):
        bad = int((~f_N.isfinite()).nonzero()[0])
        found = float(f_N[bad])
        raise InputError(
            f"an observable of response {bad} of E is {found}: a finite number is expected"
        )
    z_NR = torch.zeros_like(stats.logp_NR)
    z_NR[:, 0] = f_N.to(z_NR.dtype)
    entropy = Entropy("sequence", "rao_blackwell", "sequence", clip, "none")
    ratio_NR = None if sampler_logp_NR is None else stats.logp_NR - sampler_logp_NR
    return Evaluation(TokenStats(stats.logp_NR, z_NR), response_mask(batch), entropy, ratio_NR, None)


def response_derivative(at: Evaluation, tangent: TokenStats, unit_N: Int[Tensor, " N"]) -> FirstOrder:
    """d/d eta E[f] along v at eta = 0, with errors over the units; `tangent` of E along v.

    In the unit of f per unit of eta. Raises InputError for fewer than two units.
    """
    along = TokenStats(tangent.logp_NR, torch.zeros_like(tangent.logp_NR))
    return evaluation.derivative(at, along, unit_N)


def response_change(at: Evaluation, moved: TokenStats) -> Measured:
    """E[f] at theta' less E[f] at theta, on the same samples; `moved` of E at theta', [N, R]."""
    return evaluation.change(at, TokenStats(moved.logp_NR, at.stats.entropy_NR))
