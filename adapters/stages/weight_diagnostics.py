"""Diagnostics of self-normalised importance weights: Pareto tail, effective sample size, verdict."""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from funcprobe.types import InputError

Verdict = Literal["trust", "caution", "resample"]

FINITE_VARIANCE = 0.5  # a generalized Pareto tail has a finite variance for k below this
LARGEST_K = 0.7  # Vehtari et al. 2024: above it the bias dominates at any sample size
FEWEST_TAIL = 5  # draws needed for the fit of the tail: 25 weights in all
FEWEST_EFFECTIVE = 10  # Vehtari et al. 2024: sample size needed, 10^(1 / (1 - k)), at k = 0
# Shares of N, from the coverage given in `verdict`.
NEAR_EQUAL = 0.99  # weights spread by 10 % (rms): w - 1 is log w to 5 %
TRUSTED = 0.9
FEWEST_SHARE = 0.1  # the standard error of a mean is sqrt(10) times that of equal weights


class WeightDiagnostics(NamedTuple):
    """Diagnostics of the importance weights of one measured change; see the function `verdict`."""

    verdict: Verdict
    reason: str  # one line
    pareto_k: float | None  # None: see `reason`
    ess: float  # (sum w)^2 / sum w^2, in sequences (Kish)
    max_weight: float  # largest weight / mean weight
    clip_fraction: float  # of the sequences


def verdict(weight_N: Float[Tensor, " N"], clipped: int) -> WeightDiagnostics:
    """Whether one measured change and its standard error are reliable, by the whole-response weights.

    `weight_N` as used, `clipped` of them reduced to the clip; only their ratios matter.

    - "trust": reweighting does not impair the change and its standard error. Nothing was clipped, and
      ESS is at least 0.99 N, or 0.9 N with k up to 0.5 and up to the threshold.
    - "caution": sign and order of magnitude can be expected; the standard error may be too small, and
      omits the bias of a clip. All cases that are neither of the other two.
    - "resample": neither number should be used: sample responses at theta + eta v. ESS is below 10 or
      N/10; or it is below 0.9 N and k is above both 0.5 and the threshold; or more weights were
      clipped than Pareto smoothing would replace.

    k is the shape of a generalized Pareto distribution fitted to the largest min(N/5, 3 sqrt N)
    weights (arviz-stats); the threshold is min(1 - 1/log10 N, 0.7) (Vehtari, Simpson, Gelman, Yao,
    Gabry 2024, "Pareto smoothed importance sampling", section 3.2). Above it smoothed weights fail;
    these are not smoothed, hence the 0.5, above which they have no finite variance. k itself has a
    standard error of about (1 + k) / sqrt(tail draws): 0.2 to 0.4 at N = 128, 0.1 to 0.15 at 2048;
    hence the bounds on ESS. With log-weights of exponential tails and N = 512, 95 % intervals cover
    92 % of the time at eta -> 0, 90 % under "trust", and 60 to 85 % where k is 0.3 or more, also if the
    drawn weights are still inconspicuous (test_trusted_intervals_cover).

    k is None where ESS is at least 0.99 N (at tiny eta the tail of w - 1 = log w is that of the
    derivative's score term, which the standard error includes; or it is rounding), and for N < 25, for
    clipped and for tied weights, which leave nothing to fit.

    Whole responses are the worst case: a prefix's weight is the conditional mean of the whole
    response's, so that its spread is smaller. Only large weights matter: small ones are bounded by 0,
    and the entropy of a response by its length, so that weight times entropy has the weight's tail.

    Raises InputError for fewer than two weights, for one that is negative or not finite, if all are
    zero, and if `clipped` is not a count of them.
    """
    w_N = _weights(weight_N, clipped)
    N = len(w_N)
    ess, largest = _effective(w_N), float(w_N.max())
    k, unknown = _pareto_k(w_N, clipped)
    low, high = sorted((FINITE_VARIANCE, min(1 - 1 / math.log10(N), LARGEST_K)))
    effective = f"effective sample size {ess:.4g} of {N}"
    cut = f"{clipped} of {N} weights are clipped"
    shape = unknown if k is None else f"Pareto k is {k:.2f}"
    heavy = k is not None and k > high and ess < TRUSTED * N
    findings: tuple[tuple[bool, Verdict, str], ...] = (
        (clipped > _tail(N), "resample", f"{cut}: the clip determines the estimate"),
        (not clipped and ess >= NEAR_EQUAL * N, "trust", f"{shape}; {effective}"),
        (
            ess < max(FEWEST_EFFECTIVE, FEWEST_SHARE * N),
            "resample",
            f"only {effective}; the largest weight is {largest:.3g} times the mean",
        ),
        (heavy, "resample", f"{shape}, over {high:.2f}: unseen responses may dominate; {effective}"),
        (clipped > 0, "caution", f"{cut}, which biases the change; {effective}"),
        (k is None, "caution", f"{shape}; {effective}"),
        (
            k is not None and k > low,
            "caution",
            f"{shape}, over {low:.2f}: the standard error may be too small; {effective}",
        ),
        (ess < TRUSTED * N, "caution", f"only {effective}: the standard error may be too small"),
        (True, "trust", f"{effective}; {shape}, no heavy tail"),
    )
    judged, reason = next((v, r) for holds, v, r in findings if holds)
    return WeightDiagnostics(judged, reason, k, ess, largest, clipped / N)


def _weights(weight_N: Float[Tensor, " N"], clipped: int) -> NDArray[np.float64]:
    """The weights over their mean, float64."""
    w_N = np.asarray(weight_N.detach().cpu().double().numpy())
    if w_N.ndim != 1 or len(w_N) < 2:
        raise InputError(
            f"importance weights have shape {tuple(w_N.shape)}, one for each of at least two sequences "
            "is expected: raise sampling.B_E"
        )
    if not np.isfinite(w_N).all() or (w_N < 0).any() or not w_N.any():
        raise InputError(
            f"importance weights are between {w_N.min():g} and {w_N.max():g}, finite ones of at least "
            "0, not all 0, are expected: remove the largest measure.etas, or set entropy.clip"
        )
    if not 0 <= clipped <= len(w_N):
        raise InputError(f"clipped = {clipped}, a count of the {len(w_N)} weights is expected")
    w_N = w_N / w_N.max()  # the sum cannot overflow
    return np.asarray(w_N / w_N.mean())


def _tail(N: int) -> int:
    """Number of the largest weights that Pareto smoothing fits and replaces."""
    return min(N // 5, int(3 * math.sqrt(N)))


def _effective(w_N: NDArray[np.float64]) -> float:
    return float(w_N.sum() ** 2 / np.square(w_N).sum())


def _pareto_k(w_N: NDArray[np.float64], clipped: int) -> tuple[float | None, str]:
    """k of the right tail, or None and why."""
    tail = _tail(len(w_N))
    if clipped:
        return None, "clipped weights have no tail"
    if _effective(w_N) >= NEAR_EQUAL * len(w_N):
        return None, "the weights are nearly equal"
    if tail < FEWEST_TAIL:
        return None, f"{len(w_N)} weights are too few to fit a tail, {5 * FEWEST_TAIL} are needed"
    # The fit divides by the tail's lower quartile above the largest weight that is not in the tail.
    above = np.sort(w_N)[-tail - 1 :]
    if above[int(tail / 4 + 0.5)] == above[0]:
        return None, "the largest weights are equal, without a tail"
    from arviz_stats.base.array import array_stats

    # Its log_weights=True would fit the tail of the logarithms (arviz-stats 0.8.0).
    k = float(array_stats.pareto_khat(w_N, chain_axis=None, r_eff=1.0, tail="right"))  # type: ignore[no-untyped-call]
    return (k, "") if math.isfinite(k) else (None, "the fit of the tail does not converge")
