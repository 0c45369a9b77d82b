"""Observables beside the entropy, by its estimators with another integrand.

For f(x, y) of the whole response the self-normalised estimate at theta', from samples at theta, is

    sum_i w_i f_i / sum_i w_i,    w_i = exp(sum_j l_ij(theta') - l_ij(sampled))

and its derivative along v at theta' = theta is Cov(f, S') over E, with S' = sum_j l'_j: the entropy per
sequence with sequence weights, in which f stands at the first position and 0 at the others. For z_ik of
a token, which may depend on theta too, it is the entropy's own with z in the place of h, where z needs
only the prefix before the token (`of_tokens`); and with weights of the whole response where it needs
the token as well (`of_sampled_tokens`). Influence values, standard errors, diagnostics of the weights,
coefficients of the gradient and baselines are thus those of the entropy.

A baseline is fitted to features of the policy's own token statistics, never of f, which would reveal
the response to its prefixes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..policy.layout import response_mask
from ..types import Baseline, Batch, Entropy, InputError, TokenStats
from . import baselines, evaluation
from .estimators import FirstOrder, Measured
from .evaluation import Evaluation


def of_response(
    batch: Batch,
    stats: TokenStats,
    f_N: Float[Tensor, " N"],
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    clip: float | None = None,
    baseline: Baseline = "none",
) -> Evaluation:
    """The observable f, one number a response, on E at theta; `stats` are E's, [N, R] in nats.

    `evaluation.value` and `evaluation.gradient_coefficients` of the result are those of E[f], in the
    unit of f. Where f applies to some responses only, give those alone: the result is then E[f | f
    applies], with the derivative of a ratio; without a baseline, since whether f applies is a function
    of the response. Raises InputError unless f is finite, and as `baselines.baseline` does.
    """
    if not bool(f_N.isfinite().all()):
        bad = int((~f_N.isfinite()).nonzero()[0])
        found = float(f_N[bad])
        raise InputError(
            f"an observable of response {bad} of E is {found}: a finite number is expected"
        )
    z_NR = torch.zeros_like(stats.logp_NR)
    z_NR[:, 0] = f_N.to(z_NR.dtype)
    entropy = Entropy("sequence", "rao_blackwell", "sequence", clip, baseline)
    return _evaluation(batch, stats, z_NR, entropy, sampler_logp_NR)


def response_derivative(at: Evaluation, tangent: TokenStats, unit_N: Int[Tensor, " N"]) -> FirstOrder:
    """d/d eta E[f] along v at eta = 0, with errors over the units; `tangent` of E along v.

    In the unit of f per unit of eta. Raises InputError for fewer than two units.
    """
    along = TokenStats(tangent.logp_NR, torch.zeros_like(tangent.logp_NR))
    return evaluation.derivative(at, along, unit_N)


def response_change(at: Evaluation, moved: TokenStats) -> Measured:
    """E[f] at theta' less E[f] at theta, on the same samples; `moved` of E at theta', [N, R]."""
    return evaluation.change(at, TokenStats(moved.logp_NR, at.stats.entropy_NR))


def of_tokens(
    batch: Batch,
    stats: TokenStats,
    z_NR: Float[Tensor, "N R"],
    entropy: Entropy = Entropy(),
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
) -> Evaluation:
    """The observable sum_k z_k, z a function of theta and of the prefix before token k, as KL(p || q).

    Per token (E[sum z] / E[T]) or per sequence, with the weights and the baseline of `entropy`; its
    integrand does not matter. `evaluation.derivative` and `change` of the result take TokenStats(l',
    z') and TokenStats(l, z) at theta'. Raises InputError as `baselines.baseline` does.
    """
    return _evaluation(batch, stats, z_NR, entropy._replace(integrand="rao_blackwell"), sampler_logp_NR)


def of_sampled_tokens(
    batch: Batch,
    stats: TokenStats,
    z_NR: Float[Tensor, "N R"],
    entropy: Entropy = Entropy(),
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
) -> Evaluation:
    """`of_tokens` for a z_k that depends on token k too, as log p(y_k) - log q(y_k).

    Its importance weights are those of the response, whatever `entropy` has: they include token k.
    """
    whole = entropy._replace(weights="sequence")
    return of_tokens(batch, stats, z_NR, whole, sampler_logp_NR)


def _evaluation(
    batch: Batch,
    stats: TokenStats,
    z_NR: Tensor,
    entropy: Entropy,
    sampler_logp_NR: Tensor | None,
) -> Evaluation:
    mask_NR = response_mask(batch)
    ratio_NR = None if sampler_logp_NR is None else stats.logp_NR - sampler_logp_NR
    entropy = baselines.resolve(entropy, batch, own_samples=sampler_logp_NR is None)
    at = TokenStats(stats.logp_NR, z_NR * mask_NR)
    b_NR = None
    if entropy.baseline != "none":
        given = (entropy.baseline, batch, at, mask_NR, entropy, ratio_NR)
        b_NR = baselines.baseline(*given, prefix=stats)
    return Evaluation(at, mask_NR, entropy, ratio_NR, b_NR)
