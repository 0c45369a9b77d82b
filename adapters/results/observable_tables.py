"""What a run prints of the observables beside the entropy: the headline, and their table."""

import math

from rich.markup import escape
from rich.table import Table

from ..config.estimation import observable_label
from .observable_sections import Observable, ObservableRow
from .quantity import Interval
from .schema import Results
from .sweep_sections import SweepRow


def headline(results: Results) -> list[str]:
    """What the step changes, the entropy first, in a line; none without another observable."""
    found = _shown(results)
    if found is None:
        return []
    here, rows = found
    entropy = _with_error(here.predicted.value, here.interval_given_U)
    parts = [f"entropy {entropy} {results.entropy.unit}"]
    for one, row in rows:
        unit = row.predicted.unit
        parts.append(
            f"{observable_label(one.name)} {_with_error(row.predicted.value, row.interval_given_U)}"
            + ("" if unit == observable_label(one.name) else f" {unit}")
        )
    step = f"This step (lr {here.eta:g})" if here.is_next_lr else f"A step of lr {here.eta:g}"
    return [f"{step}: {', '.join(parts)} (predicted, ±: 95 % over E, given U)"]


def table(results: Results) -> Table | None:
    """The observables at the learning rate of the headline, a row each."""
    found = _shown(results)
    if found is None:
        return None
    here, rows = found
    coming = ", the next lr" if here.is_next_lr else ""
    shown = Table(
        title=f"Other observables at eta = {here.eta:.3g}{coming} (±: 95 % over E, given U)",
        title_justify="left",
    )
    for column in ("", "at theta", "±", "predicted", "±", "measured", "±", "ratio", "unit"):
        shown.add_column(column, justify="left" if column in {"", "unit"} else "right", no_wrap=True)
    for one, row in rows:
        rounding = here.rounding if row.rounding is None else row.rounding  # of KL as of the entropy
        measured = None if rounding else row.measured_interval_given_U
        some = one.responses < results.counts.E_sequences
        shown.add_row(
            escape(observable_label(one.name)),
            f"{one.at_theta.value:.4g}",
            f"{one.interval.half_width:.1e}",
            f"{row.predicted.value:+.3e}",
            f"{row.interval_given_U.half_width:.1e}",
            f"{row.measured.value:+.3e}",
            f"{measured.half_width:.1e}" if measured else "-",
            f"{row.ratio.value:.4f}" if measured and row.ratio else "-",
            escape(row.predicted.unit) + (f" ({one.responses} responses)" if some else ""),
        )
    return shown


def _shown(results: Results) -> tuple[SweepRow, list[tuple[Observable, ObservableRow]]] | None:
    """The row of the next step's learning rate, else of the largest that the weights allow."""
    if not results.observables:
        return None
    coming = [row for row in results.sweep if row.is_next_lr]
    reliable = [row for row in results.sweep if row.verdict != "resample"]
    here = (coming or reliable or list(results.sweep))[-1]
    return here, [(one, at) for one in results.observables for at in one.sweep if at.eta == here.eta]


def _with_error(value: float, interval: Interval) -> str:
    """With as many digits as leave two to the half-width of the interval."""
    half = interval.half_width
    if not half:
        return f"{value:.3g} (equal in all of E)"
    digits = 1 - math.floor(math.log10(half))
    if not 0 <= digits <= 6:
        return f"{value:+.1e} ± {half:.1e}"
    return f"{value:+.{digits}f} ± {half:.{digits}f}"
