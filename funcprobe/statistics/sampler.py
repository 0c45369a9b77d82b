"""Was a response sampled from the distribution that its log-probabilities state? Sums of mean 0.

Each test sums, over the tokens of all responses, terms whose mean given the tokens before is 0 (a
martingale), so that responses to one prompt need not be independent.
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, xlogy

from ..types import ResponseMask, TokenStats


class Drift(NamedTuple):
    """Mean over responses of a sum that has mean 0, its standard error, and their ratio."""

    mean: float
    se: float

    @property
    def z(self) -> float:
        """mean / se; infinite where the error is 0 and the mean is not."""
        if self.se:
            return self.mean / self.se
        return math.copysign(math.inf, self.mean) if self.mean else 0.0


def entropy_drift(stats: TokenStats, mask_NR: ResponseMask) -> Drift:
    """Of sum_k (l_ik + h_ik), nats: E[l + h | prefix] = 0 if theta is the sampler.

    The variance of the sum over all N responses is N times that of a response's. A sample in which none
    of the rare tokens occurs shows no variance, so that it is bounded below by - sum h log min(h, 1),
    somewhat less than the variance of l if all tokens but one are rare.
    """
    excess_N = ((stats.logp_NR + stats.entropy_NR).double() * mask_NR).sum(1)
    h_NR = (stats.entropy_NR.double() * mask_NR).clamp(min=0)
    rare = -float(xlogy(h_NR, h_NR.clamp(max=1)).sum())
    count = len(excess_N)
    return Drift(float(excess_N.mean()), math.sqrt(max(count * float(excess_N.var()), rare)) / count)


def ratio_drift(
    stats: TokenStats, sampler_logp_NR: Float[Tensor, "N R"], mask_NR: ResponseMask
) -> Drift:
    """Of sum_k (rho_ik - 1), rho = exp(l - sampler's l): E[rho | prefix] = 1, whatever the sampler.

    Also true of whole-response weights, the products of rho. But their spread grows exponentially with
    the length, so that the largest decides their mean, while this sum's grows as the root of the length
    and the drift in proportion to it. If theta drew the tokens and the stated probabilities are p', the
    drift is positive: the chi-square distance of theta from p', at every token. It is negative if theta
    gives tokens probability that the sampler cannot draw (top_p, top_k).

    The variance is the sum of (rho - 1)^2: increments of a martingale are uncorrelated. One large ratio
    enters the sum and its error alike, so that no outlier makes a large positive z. A deficit, rho < 1
    at likely tokens, is made up for by rare ones with rho > 1, of which a sample may have none: a
    negative sum has the variance of such tokens with rho = 2 added, which is the sum of (1 - rho)_+.
    """
    log_ratio_NR = (stats.logp_NR - sampler_logp_NR).double() * mask_NR
    excess_NR = log_ratio_NR.expm1()
    total, variance = float(excess_NR.sum()), float(excess_NR.square().sum())
    if total < 0:
        variance += float((-excess_NR).clamp(min=0).sum())
    count = len(excess_NR)
    return Drift(total / count, math.sqrt(variance) / count)
