"""The observables beside the entropy -> results.json."""

from collections.abc import Iterable

from funcprobe.statistics.intervals import Error, delta_error

from ..stages.observables import Observed
from ..stages.sweep import Sweep
from .observable_sections import Observable, ObservableRow
from .quantity import quantity, student_interval
from .sweep import is_rounding


def observables(observed: Iterable[Observed], sweep: Sweep, next_lr: float) -> tuple[Observable, ...]:
    """A section for each, with a row for every learning rate of the sweep."""
    return tuple(_observable(one, sweep, next_lr) for one in observed)


def _observable(one: Observed, sweep: Sweep, next_lr: float) -> Observable:
    slope = one.derivative
    rate, over = f"{one.unit} per unit of learning rate", "sampling units of E"
    error = delta_error(slope.influence_N, one.unit_n)

    def row(i: int) -> ObservableRow:
        eta, measured = sweep.points[i].eta, one.measured[i]
        predicted = eta * slope.derivative
        difference = measured.delta - predicted
        holds = sweep.points[i].diagnostics.verdict != "resample"
        of_measured = delta_error(measured.influence_N, one.unit_n)
        of_difference = delta_error(measured.influence_N - eta * slope.influence_N, one.unit_n)
        return ObservableRow(
            eta=eta,
            is_next_lr=eta == next_lr,
            predicted=quantity(predicted, one.unit, one.normalised_by),
            interval_given_U=student_interval(predicted, Error(eta * error.se, error.dof)),
            measured=quantity(measured.delta, one.unit, one.normalised_by),
            measured_interval_given_U=student_interval(measured.delta, of_measured) if holds else None,
            difference=quantity(difference, one.unit, "measured - predicted, on the same samples"),
            difference_interval=student_interval(difference, of_difference) if holds else None,
            ratio=quantity(measured.delta / predicted, "1", "measured / predicted")
            if predicted
            else None,
            rounding=None if one.rounding is None else is_rounding(measured.delta, one.rounding),
        )

    return Observable(
        name=one.name,
        weights=one.weights,
        baseline=one.baseline,
        responses=one.responses,
        at_theta=quantity(one.value, one.unit, one.normalised_by),
        interval=student_interval(one.value, one.value_error),
        derivative=quantity(slope.derivative, rate, one.normalised_by),
        se_given_U=quantity(error.se, rate, over),
        interval_given_U=student_interval(slope.derivative, error),
        sweep=tuple(row(i) for i in range(len(sweep.points))),
    )
