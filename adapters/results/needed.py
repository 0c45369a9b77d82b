"""How large the batches would have to be for a change to differ from 0."""

import math
from collections.abc import Callable

from funcprobe.statistics.intervals import LEVEL, Error, student_quantile, total

from .verdict_sections import Needed

MOST = 10  # times as large: beyond it no number is given
NEAR_0 = 0.2  # standard errors: an estimate below them says nothing about the size of the change


def needed(
    estimate: float,
    over_E: Error,
    responses: int,
    over_U: Error | None = None,
    prompts: int = 0,
    fixed: Error | None = None,
) -> Needed | None:
    """The smallest batches at which |estimate| > t SE; None if it holds already, or nothing changes.

    With b_E responses of E instead of n_E and b_U prompts of U instead of n_U,

        SE^2(b_E, b_U) = s_E^2 n_E / b_E + s_U^2 n_U / b_U + s_F^2,

    with the standard errors s_E, s_U of the batches as they are, and s_F (dropout masks) that no batch
    reduces. t is Student's 97.5 % quantile; the degrees of freedom of a part grow as b - 1, those of SE
    follow by Welch-Satterthwaite. In this order, each up to ten times the size: b_U with E as it is,
    b_E with U as it is, both by a common factor. Without `over_U`, U is given and b_E alone counts.

    What is promised: there |z| is expected to reach the bound, so that the interval excludes 0 about
    every second time if the true change is `estimate`. That is itself known to within a standard error
    only; an estimate within a fifth of one gives no number.
    """
    if not (over_U and over_U.se):
        prompts = 0
    constant = [fixed] if fixed else []

    def whole(times_E: float, times_U: float) -> Error:
        of_U = [_grown(over_U, prompts, times_U)] if over_U and prompts else []
        return total(_grown(over_E, responses, times_E), *of_U, *constant)

    def differs(times_E: float, times_U: float) -> bool:
        return _excludes_0(estimate, whole(times_E, times_U))

    if not estimate or differs(1, 1):
        return None
    near_0 = abs(estimate) < NEAR_0 * whole(1, 1).se
    if near_0 or not all(_excludes_0(estimate, error) for error in constant):
        return Needed(kind="no number", U_prompts=None, E_responses=None)
    if prompts and (count := _smallest(lambda b: differs(1, b / prompts), prompts)):
        return Needed(kind="U", U_prompts=count, E_responses=None)
    if count := _smallest(lambda b: differs(b / responses, 1), responses):
        return Needed(kind="E", U_prompts=None, E_responses=count)
    if prompts and (count := _smallest(lambda b: differs(b / prompts, b / prompts), prompts)):
        alike = math.ceil(responses * count / prompts)
        return Needed(kind="both", U_prompts=count, E_responses=alike)
    return Needed(kind="beyond", U_prompts=None, E_responses=None)


def _excludes_0(estimate: float, error: Error) -> bool:
    return abs(estimate) > student_quantile(LEVEL, error.dof) * error.se


def _grown(error: Error, units: int, times: float) -> Error:
    """The error of a batch so many times as large; of n units the degrees of freedom grow as n - 1."""
    if times == 1:
        return error
    return Error(error.se / math.sqrt(times), error.dof * (units * times - 1) / max(units - 1, 1))


def _smallest(enough: Callable[[int], bool], size: int) -> int | None:
    """The smallest count above `size` that is enough, up to MOST times the size; by bisection."""
    low, high = size, MOST * size
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
