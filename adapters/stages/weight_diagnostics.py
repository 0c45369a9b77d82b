"""How far self-normalised importance weights may be trusted: tail, effective sample size."""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from funcprobe.types import InputError

Verdict = Literal["trust", "caution", "resample"]

FINITE_VARIANCE = 0.5  # a generalized Pareto tail has a variance where its k is below
LARGEST_K = 0.7  # Vehtari et al. 2024: above it the bias dominates at any sample size
FEWEST_TAIL = 5  # draws that the tail's fit needs: 25 weights in all
FEWEST_EFFECTIVE = 10  # Vehtari et al. 2024: the sample an average needs, 10^(1 / (1 - k)), at k = 0
# Shares of N, from the coverage that `verdict` tells of.
NEAR_EQUAL = 0.99  # weights spread by 10 % (rms): w - 1 is log w to 5 %
TRUSTED = 0.9
FEWEST_SHARE = 0.1  # the standard error of a mean is sqrt(10) times that of equal weights


class Hygiene(NamedTuple):
    """What the weights of whole responses say of one measured change; `verdict` the function."""

    verdict: Verdict
    reason: str  # one line
    pareto_k: float | None  # None: see `reason`
    ess: float  # (sum w)^2 / sum w^2, in sequences (Kish)
    max_weight: float  # largest weight / mean weight
    clip_fraction: float  # of the sequences


def verdict(weight_N: Float[Tensor, " N"], clipped: int) -> Hygiene:
    """Whether one measured change and its standard error hold, from the weights of whole responses.

    `weight_N` as they were used, `clipped` of them cut at the clip; only their ratios matter.

    - "trust": reweighting takes nothing from the change and its standard error. Nothing was clipped,
      and ESS is at least 0.99 N, or 0.9 N with k up to 0.5 and up to the threshold.
    - "caution": expect the sign and the order of magnitude; the standard error may be too small, and
      leaves out the bias of a clip. Whatever is neither of the other two.
    - "resample": neither number is to be used: sample responses at theta + eta v. ESS is below 10 or
      N/10; or it is below 0.9 N and k is above both 0.5 and the threshold; or more weights were
      clipped than Pareto smoothing would touch.

    k is the shape of a generalized Pareto distribution fitted to the largest min(N/5, 3 sqrt N)
    weights (arviz-stats); the threshold is min(1 - 1/log10 N, 0.7) (Vehtari, Simpson, Gelman, Yao,
    Gabry 2024, "Pareto smoothed importance sampling", section 3.2). Beyond it smoothed weights fail;
    these are used as they are, hence the 0.5, above which they have no variance. k itself has a
    standard error of about (1 + k) / sqrt(tail draws): 0.2 to 0.4 at N = 128, 0.1 to 0.15 at 2048;
    hence the bounds on ESS. With log-weights of exponential tails and N = 512, 95 % intervals cover
    92 % of the time at eta -> 0, 90 % under "trust", and 60 to 85 % where k is 0.3 or more, also where
    the drawn weights still look well (tests/test_weight_diagnostics.py).

    k is None where ESS is at least 0.99 N (tiny eta: the tail of w - 1 = log w is that of the
    derivative's score term, which the standard error has; or rounding), and for N < 25, clipped
    weights and tied ones, which leave nothing to fit.

    Whole responses are the worst case: a prefix's weight is the conditional mean of the whole
    response's, so that it spreads less. Only large weights matter: small ones are bounded by 0, and
    the entropy of a response by its length, so that weight times entropy has the weight's tail.

    Raises InputError for fewer than two weights, for one that is negative or not finite, if all are
    zero, and for a `clipped` that is no count of them.
    """
    w_N = _weights(weight_N, clipped)
    N = len(w_N)
    ess, largest = _effective(w_N), float(w_N.max())
    k, unknown = _pareto_k(w_N, clipped)
    low, high = sorted((FINITE_VARIANCE, min(1 - 1 / math.log10(N), LARGEST_K)))
    effective = f"{ess:.4g} of {N} sequences are effective"
    cut = f"{clipped} of {N} weights are clipped"
    shape = unknown if k is None else f"Pareto k is {k:.2f}"
    heavy = k is not None and k > high and ess < TRUSTED * N
    findings: tuple[tuple[bool, Verdict, str], ...] = (
        (clipped > _tail(N), "resample", f"{cut}: the clip makes the estimate"),
        (not clipped and ess >= NEAR_EQUAL * N, "trust", f"{shape}; {effective}"),
        (
            ess < max(FEWEST_EFFECTIVE, FEWEST_SHARE * N),
            "resample",
            f"only {effective}; the largest weight is {largest:.3g} times the mean",
        ),
        (heavy, "resample", f"{shape}, over {high:.2f}: unseen responses may decide; {effective}"),
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
    return Hygiene(judged, reason, k, ess, largest, clipped / N)


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
            f"importance weights lie between {w_N.min():g} and {w_N.max():g}, finite ones from 0 up, "
            "not all 0, are expected: leave the largest measure.etas out or set entropy.clip"
        )
    if not 0 <= clipped <= len(w_N):
        raise InputError(f"{clipped} of {len(w_N)} weights are said to be clipped: pass their count")
    w_N = w_N / w_N.max()  # the sum cannot overflow
    return np.asarray(w_N / w_N.mean())


def _tail(N: int) -> int:
    """How many of the largest weights Pareto smoothing fits and replaces."""
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
        return None, f"{len(w_N)} weights are too few for a tail, {5 * FEWEST_TAIL} are needed"
    # The fit divides by the tail's lower quartile above the largest weight that is not in the tail.
    above = np.sort(w_N)[-tail - 1 :]
    if above[int(tail / 4 + 0.5)] == above[0]:
        return None, "the largest weights are equal, which is no tail"
    from arviz_stats.base.array import array_stats

    # Its log_weights=True would fit the tail of the logarithms (arviz-stats 0.8.0).
    k = float(array_stats.pareto_khat(w_N, chain_axis=None, r_eff=1.0, tail="right"))  # type: ignore[no-untyped-call]
    return (k, "") if math.isfinite(k) else (None, "the tail's fit does not converge")
