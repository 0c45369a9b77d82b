"""The path of the entropy over training: what the predictions at each checkpoint add up to."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from funcprobe.statistics.intervals import LEVEL, Error, delta_error, student, student_quantile, total

from .comparison_sections import Between, EntropyPath, Logged, Reached
from .quantity import Interval, StudentInterval
from .saved import SavedRun

if TYPE_CHECKING:
    from ..checkpoint.training_log import TrainingLog

CLOSE = 1e-6  # relative, of numbers that a table must give again before it is used
WHAT = (
    "From a checkpoint to the next one compared, the entropy is predicted to change by the derivative "
    "along v there times the sum of the learning rates of the n steps between: to first order, as if "
    "each of them were the step on an average batch from the first checkpoint. Its 95 % interval has "
    "the error over E, common to all n steps, and the error over U’s prompts twice: U’s own, and that "
    "of the n batches that training drew instead, B_U prompts of U and B in each of them: "
    "se_U² (1 + B_U / (n B)), each batch by its part in one step: what momentum carries of it into the "
    "steps after is left out, so that for n > 1 the interval is too narrow. The sum over checkpoints "
    "adds the errors of its parts up, as if they were perfectly correlated, since all checkpoints have "
    "the same prompts and seeds: a bound."
)


class Point(NamedTuple):
    """A checkpoint."""

    step: int
    run: SavedRun
    batch: int | None  # prompts of a training step; None: not known, and as many as U's are assumed


class _Influence(NamedTuple):
    """Of every draw of E, on the entropy and on the derivative."""

    prompts: tuple[int, ...]
    entropy_N: torch.Tensor
    derivative_N: torch.Tensor


def entropy_path(points: Sequence[Point], log: "TrainingLog | None") -> EntropyPath | None:
    """Of checkpoints of one training in the order of their steps; None: learning rates are unknown."""
    rates, said = _rates(points, log)
    if not all(rate > 0 for rate in rates):
        return None
    influences = [_influence(point.run) for point in points]
    between = tuple(
        _between(a, b, rate, x, y)
        for (a, b), rate, (x, y) in zip(pairwise(points), rates, pairwise(influences), strict=True)
    )
    return EntropyPath(
        what=WHAT,
        learning_rates=said,
        between=between,
        reached=_reached(points[0], between),
        logged=_logged(log),
        logged_what=_logged_what(log),
        agree=sum(one.agrees for one in between),
    )


def _between(a: Point, b: Point, rate: float, x: _Influence | None, y: _Influence | None) -> Between:
    first, counts = a.run.results.first_order, a.run.results.counts
    of_E = Error(rate * first.se_given_U.value, first.interval_given_U.degrees_of_freedom)
    drawn = counts.U_prompts / ((b.step - a.step) * (a.batch or counts.U_prompts))
    of_U = Error(
        rate * first.se_over_U.value * math.sqrt(1 + drawn), first.interval_over_U.degrees_of_freedom
    )
    of_step = [of_U]
    if (masks := first.masks) is not None:
        dof = masks.interval_one_step.degrees_of_freedom
        of_step.append(Error(rate * masks.se_one_step.value, dof))
    predicted = rate * first.derivative.value
    start, end = a.run.results, b.run.results
    actual = end.entropy.value - start.entropy.value
    paired = x is not None and y is not None and x.prompts == y.prompts
    if x is not None and y is not None and paired:
        draws = torch.arange(len(x.prompts))
        change_N = y.entropy_N - x.entropy_N
        actual_error = delta_error(change_N, draws)
        apart = delta_error(change_N - rate * x.derivative_N, draws)
    else:
        ends = (start.entropy_interval, end.entropy_interval)
        actual_error = total(*(_error(one) for one in ends))
        apart = total(actual_error, of_E)
    difference = actual - predicted
    difference_interval = _interval(difference, total(apart, *of_step))
    return Between(
        first=a.step,
        last=b.step,
        learning_rates=rate,
        predicted=predicted,
        predicted_interval=_interval(predicted, total(of_E, *of_step)),
        actual=actual,
        actual_interval=_interval(actual, actual_error),
        paired=paired,
        difference=difference,
        difference_interval=difference_interval,
        agrees=difference_interval.low <= 0 <= difference_interval.high,
    )


def _reached(first: Point, between: Sequence[Between]) -> tuple[Reached, ...]:
    start = first.run.results
    entropy, interval = start.entropy.value, start.entropy_interval
    bound, square = interval.half_width, interval.half_width**2
    found = [_at(first.step, entropy, bound, square)]
    for one in between:
        entropy += one.predicted
        bound += one.predicted_interval.half_width
        square += one.predicted_interval.half_width**2
        found.append(_at(one.last, entropy, bound, square))
    return tuple(found)


def _at(step: int, entropy: float, bound: float, square: float) -> Reached:
    interval = Interval(low=entropy - bound, high=entropy + bound)
    return Reached(
        step=step, entropy=entropy, interval=interval, independent_half_width=math.sqrt(square)
    )


def _rates(points: Sequence[Point], log: "TrainingLog | None") -> tuple[list[float], str]:
    """The sum of the learning rates between neighbours, and where they are from."""
    logged = _logged_rates(points, log)
    sums, straight = [], 0
    for a, b in pairwise(points):
        own = [logged[step] for step in range(a.step + 1, b.step + 1) if step in logged]
        n = b.step - a.step
        if len(own) < n:
            straight += 1
            start, end = a.run.results.next_lr.value, b.run.results.next_lr.value
            own = [start + (end - start) * i / n for i in range(n)]
        sums.append(sum(own))
    if not straight:
        return sums, "of every step, as the trainer logged it"
    rest = "" if straight == len(sums) else f" for {straight} of {len(sums)}, else as logged"
    return sums, f"on the straight line between the next learning rates of the two checkpoints{rest}"


def _logged_rates(points: Sequence[Point], log: "TrainingLog | None") -> Mapping[int, float]:
    """Step -> its learning rate; none where the log does not agree with the optimizer's states.

    Trainers log that of the step just taken, earlier ones of the next: whichever agrees.
    """
    rates = {} if log is None else {e.step: e.learning_rate for e in log.entries}
    for shift in (1, 0):
        moved = {s + 1 - shift: r for s, r in rates.items() if r is not None}
        seen = [(moved[p.step + 1], p) for p in points if p.step + 1 in moved]
        if seen and all(
            math.isclose(rate, p.run.results.next_lr.value, rel_tol=CLOSE) for rate, p in seen
        ):
            return moved
    return {}


def _logged(log: "TrainingLog | None") -> tuple[Logged, ...]:
    """The entropy logged at step s is of the batches of the steps since the entry before, which the
    policies before those steps sampled: at s, logged at every step, of the policy after s - 1 steps."""
    found, before = [], 0
    for entry in log.entries if log else ():
        if entry.entropy is not None:
            found.append(Logged(step=(before + entry.step - 1) / 2, entropy=entry.entropy))
            before = entry.step
    return tuple(found)


def _logged_what(log: "TrainingLog | None") -> str:
    if log is None:
        return "no trainer_state.json was found beside the checkpoints: give one by --log"
    if not log.has_entropy:
        bad = f": {log.left_out} entries are no finite number" if log.left_out else ""
        return f'{log.file} logs no entropy (the key "entropy" of TRL\'s log){bad}'
    out = f"; {log.left_out} entries are left out, being no finite number" if log.left_out else ""
    return (
        "what the trainer logged: the mean entropy over the tokens of its own training batches, of the "
        "policy before each step, without an interval. Other prompts than E’s, and few: it scatters "
        f"more than the entropy on E{out}"
    )


def _influence(run: SavedRun) -> _Influence | None:
    """From sequences.parquet, where it gives the run's own numbers and their errors again."""
    table = run.table("sequences")
    needed = {"batch", "entropy", "response_tokens", "influence", "prompt_index"}
    if table is None or not needed <= set(table.column_names):
        return None
    rows = [row for row in table.select(sorted(needed)).to_pylist() if row["batch"] == "E"]
    if len(rows) < 2 or any(row["entropy"] is None or row["influence"] is None for row in rows):
        return None
    results = run.results
    entropy_N, tokens_N, derivative_N = (
        torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
        for name in ("entropy", "response_tokens", "influence")
    )
    if results.conventions.entropy.per == "sequence":
        tokens_N = torch.ones_like(tokens_N)
    value = float(entropy_N.sum() / tokens_N.sum())
    influence_N = (entropy_N - value * tokens_N) / tokens_N.sum()
    draws = torch.arange(len(rows))
    again = (
        (value, results.entropy.value),
        (delta_error(influence_N, draws).se, _error(results.entropy_interval).se),
        (delta_error(derivative_N, draws).se, results.first_order.se_given_U.value),
    )
    if not all(math.isclose(one, other, rel_tol=CLOSE) for one, other in again):
        return None
    return _Influence(tuple(row["prompt_index"] for row in rows), influence_N, derivative_N)


def _error(interval: StudentInterval) -> Error:
    dof = interval.degrees_of_freedom
    return Error(interval.half_width / student_quantile(LEVEL, dof), dof)


def _interval(value: float, error: Error) -> Interval:
    low, high = student(value, error)
    return Interval(low=low, high=high)
