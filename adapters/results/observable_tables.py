"""What a run prints of the observables beside the entropy: the headline, and their table."""

import math

from rich.markup import escape
from rich.table import Table

from ..config.estimation import observable_label
from .observable_sections import Observable, ObservableRow
from .quantity import Interval
from .schema import Results


def headline(results: Results) -> list[str]:
    """What the step changes, the entropy first, in a line; none without another observable."""
    found = _shown(results)
    if found is None:
        return []
    eta, is_next, entropy, rows = found
    parts = [f"entropy {entropy} {results.entropy.unit}"]
    for one, row in rows:
        unit = row.predicted.unit
        parts.append(
            f"{observable_label(one.name)} {_with_error(row.predicted.value, row.interval_given_U)}"
            + ("" if unit == observable_label(one.name) else f" {unit}")
        )
    step = f"This step (lr {eta:g})" if is_next else f"A step of lr {eta:g}"
    return [f"{step}: {', '.join(parts)} (predicted, ±: 95 % over E, given U)"]


def table(results: Results) -> Table | None:
    """The observables at the learning rate of the headline, a row each."""
    found = _shown(results)
    if found is None:
        return None
    eta, is_next, _, rows = found
    shown = Table(
        title=f"Other observables at eta = {eta:.3g}{', the next lr' if is_next else ''} "
        "(±: 95 % over E, given U)",
        title_justify="left",
    )
    for column in ("", "at theta", "±", "predicted", "±", "measured", "±", "ratio", "unit"):
        shown.add_column(column, justify="left" if column in {"", "unit"} else "right", no_wrap=True)
    for one, row in rows:
        measured = None if row.rounding else row.measured_interval_given_U
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


def _shown(
    results: Results,
) -> tuple[float, bool, str, list[tuple[Observable, ObservableRow]]] | None:
    """The learning rate to show: the next step's, else the largest that the weights allow; its rows."""
    if not results.observables:
        return None
    rows = results.sweep
    chosen = [row for row in rows if row.is_next_lr] or [
        row for row in rows if row.verdict != "resample"
    ]
    row = (chosen or list(rows))[-1]
    entropy = _with_error(row.predicted.value, row.interval_given_U)
    shown = [(one, at) for one in results.observables for at in one.sweep if at.eta == row.eta]
    return row.eta, row.is_next_lr, entropy, shown


def _with_error(value: float, interval: Interval) -> str:
    """With as many digits as leave two to the half-width of the interval."""
    half = interval.half_width
    if not half:
        return f"{value:.3g} (equal in all of E)"
    digits = 1 - math.floor(math.log10(half))
    if not 0 <= digits <= 6:
        return f"{value:+.1e} ± {half:.1e}"
    return f"{value:+.{digits}f} ± {half:.{digits}f}"
