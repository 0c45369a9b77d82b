"""Confidence intervals of estimates that are functions of sums over sampling units.

An `Error` is a standard error with its degrees of freedom, from which `student` gives an interval:

    given U (derivative, measured change)   delta_error(influence_N, unit_N), the units those of E
    measured - eta * derivative             the same, of the difference of their influence values
    over U, P held fixed                    update_error(parts, prompt_N), with t_n = <P X, Y_n>
    in total                                total(given, over), for the derivative along the mean v

The units are assumed independent and identically distributed, with any dependence inside a unit: the
draws of E if its prompts were drawn with replacement, else its prompts; the prompts of U. `jackknife`
and `bootstrap` are cross-checks that take the estimator as a function of sums, such as
`estimators.ratio_derivative` of `first_order_cells`. Coverage of all: benchmarks/RESULTS.md.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..types import InputError
from .estimators import Cells, influence_se, update_influence
from .weights import by_unit

Statistic: TypeAlias = Callable[..., Float[Tensor, "..."]]
"""Sums of the cells, [..., g] each -> estimates [...]."""

LEVEL = 0.95


class Interval(NamedTuple):
    low: float
    high: float


class Error(NamedTuple):
    """A standard error and the degrees of freedom of its square."""

    se: float
    dof: float


def student(estimate: float, error: Error, level: float = LEVEL) -> Interval:
    """estimate +- t se, t Student's two-sided quantile. Raises InputError for a level not in (0, 1)."""
    half = student_quantile(level, error.dof) * error.se
    return Interval(estimate - half, estimate + half)


def delta_error(influence_N: Float[Tensor, " N"], unit_N: Int[Tensor, " N"]) -> Error:
    """`estimators.influence_se`, with `variance_dof`. Raises InputError for fewer than two units."""
    return Error(influence_se(influence_N, unit_N), variance_dof(by_unit(influence_N, unit_N)))


class UpdatePart(NamedTuple):
    """What every sequence of U adds to a ratio of two sums over them, divided by the lower one."""

    t_N: Float[Tensor, " N"]
    normaliser_N: Float[Tensor, " N"]  # what it adds to the lower sum, up to a common factor


def update_error(parts: Sequence[UpdatePart], prompt_N: Int[Tensor, " N"]) -> Error:
    """Of the sum of all t_n over the prompts of U, by the delete-one jackknife in closed form.

    J may consist of parts with different divisors. Without prompt m each part, a ratio, differs by
    -influence_m / (1 - d_m), with `update_influence` and d_m the prompt's share of its divisor. With
    equal d_m the standard error is sqrt(M) times the standard deviation of t_m; where they are unequal
    the delta method's would be too small, as a prompt with a large share draws the ratio to itself.
    Raises InputError for fewer than two prompts.
    """
    changes = [torch.zeros(len(prompt_N.unique()), dtype=torch.float64)]
    for t_N, normaliser_N in parts:
        influence_M = by_unit(update_influence(t_N, normaliser_N), prompt_N)
        share_M = by_unit(normaliser_N, prompt_N) / normaliser_N.sum()
        alone_M = share_M == 1  # without this prompt nothing is left of the part
        others_M = influence_M / torch.where(alone_M, -1.0, share_M - 1)
        changes.append(torch.where(alone_M, -by_unit(t_N, prompt_N), others_M))
    return jackknife_error(torch.stack(changes).sum(0))


def total(*parts: Error) -> Error:
    """Independent errors combined: root of the sum of squares, dof by Welch-Satterthwaite.

    1 / dof = sum_i (se_i^2 / sum se^2)^2 / dof_i. The parts given U and over U are not quite
    independent: each includes the product of the noises of E and U, so that their total is slightly too
    large.
    """
    variance = sum(part.se**2 for part in parts)
    if variance == 0:
        return Error(0.0, min(part.dof for part in parts))
    inverse = sum((part.se**2 / variance) ** 2 / part.dof for part in parts)
    return Error(math.sqrt(variance), 1 / inverse)


def variance_dof(centred_M: Float[Tensor, " M"]) -> float:
    """2 M / (kurtosis - (M - 3) / (M - 1)), at most M - 1: small for heavy tails.

    The degrees of freedom of a chi-square whose relative variance is that of the sample variance
    (O'Neill, The American Statistician 68, 2014), with the kurtosis of `centred_M`, whose mean is 0.
    """
    M, largest = len(centred_M), float(centred_M.abs().max())
    if largest == 0:
        return M - 1
    square_M = (centred_M / largest).square()  # scaled, as fourth powers at tiny etas underflow
    excess = float(square_M.square().mean()) / float(square_M.mean()) ** 2 - (M - 3) / (M - 1)
    return min(M - 1, 2 * M / excess)


def jackknife(cells: Cells, unit_N: Int[Tensor, " N"], statistic: Statistic) -> Float[Tensor, " M"]:
    """The estimate with each unit left out in turn."""
    return statistic(*(c.sum(0) - by_unit(c, unit_N) for c in cells))


def jackknife_error(left_out_M: Float[Tensor, " M"]) -> Error:
    """Root of (M - 1) / M times the sum of squares about the mean, with `variance_dof`.

    Raises InputError for fewer than two units.
    """
    M = _at_least_two(len(left_out_M))
    centred_M = left_out_M - left_out_M.mean()
    return Error(math.sqrt((M - 1) / M * float(centred_M.square().sum())), variance_dof(centred_M))


def bootstrap(
    cells: Cells,
    unit_N: Int[Tensor, " N"],
    statistic: Statistic,
    generator: torch.Generator,
    times: int = 1000,
) -> Float[Tensor, " times"]:
    """The estimate on bootstrap samples of M units, drawn with replacement: their standard deviation is
    a standard error, `basic` gives the interval. Raises InputError for fewer than two units.
    """
    units, index_N = unit_N.unique(return_inverse=True)
    counts = bootstrap_counts(_at_least_two(len(units)), times, generator)
    return statistic(*(counts @ by_unit(c, index_N) for c in cells))


def bootstrap_counts(units: int, times: int, generator: torch.Generator) -> Float[Tensor, "times M"]:
    """Number of times that each unit occurs in each bootstrap sample."""
    drawn = torch.randint(units, (times, units), generator=generator)
    cell = drawn + units * torch.arange(times)[:, None]
    return torch.bincount(cell.flatten(), minlength=times * units).view(times, units).double()


def basic(estimate: float, resampled: Float[Tensor, " times"], level: float = LEVEL) -> Interval:
    """The basic bootstrap interval: quantiles of the bootstrap estimates, reflected at the estimate."""
    tails = torch.tensor([(1 + level) / 2, (1 - level) / 2], dtype=resampled.dtype)
    high, low = resampled.quantile(tails).tolist()
    return Interval(2 * estimate - high, 2 * estimate - low)


def student_quantile(level: float, dof: float) -> float:
    """t with P(|T| < t) = level for Student's T, relative error under 1e-10 for levels up to 0.9999.

    By Newton's method from the normal quantile: P is concave in t and the start lies below the root, so
    that no step overshoots. Raises InputError for a level not in (0, 1).
    """
    if not 0 < level < 1:
        raise InputError(f"level = {level:g}: a number between 0 and 1 is expected, such as 0.95")
    t = step = NormalDist().inv_cdf((1 + level) / 2)
    log_beta = _log_beta_half(dof / 2)
    while step > 1e-12 * t:
        log_density = -math.log(dof) / 2 - log_beta - (dof + 1) / 2 * math.log1p(t * t / dof)
        step = (_student_tails(t, dof) - (1 - level)) / (2 * math.exp(log_density))
        t += step
    return t


def _student_tails(t: float, dof: float) -> float:
    """P(|T| > t) = I_x(dof / 2, 1 / 2), x = dof / (dof + t^2); or 1 - I_{1-x}(1 / 2, dof / 2)."""
    if t * t > dof:
        return _incomplete_beta(dof / 2, 0.5, dof / (dof + t * t), _log_beta_half(dof / 2))
    return 1 - _incomplete_beta(0.5, dof / 2, t * t / (dof + t * t), _log_beta_half(dof / 2))


def _incomplete_beta(a: float, b: float, x: float, log_beta: float) -> float:
    """I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) sum_n (a + b)_n / (a + 1)_n x^n (DLMF 8.17.8).

    All terms are positive, so that there is no cancellation.
    """
    term = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
    value, n = 0.0, 0
    while term > 1e-17 * value:
        value += term
        term *= (a + b + n) / (a + 1 + n) * x
        n += 1
    return value


def _log_beta_half(b: float) -> float:
    """log B(1/2, b)."""
    if b < 50:
        return math.lgamma(0.5) + math.lgamma(b) - math.lgamma(b + 0.5)
    # The difference of two large lgamma loses digits; for b >= 50 its asymptotic series has them all.
    return math.lgamma(0.5) - math.log(b) / 2 + 1 / (8 * b) - 1 / (192 * b**3) + 1 / (640 * b**5)


def _at_least_two(units: int) -> int:
    if units < 2:
        raise InputError(f"{units} sampling unit: an interval needs at least two")
    return units
