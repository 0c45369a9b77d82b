"""The observables beside the entropy as a table: values, predicted and measured changes."""

from rich import box
from rich.markup import escape
from rich.table import Table

from ..config.estimation import observable_label
from .digits import with_half
from .observable_sections import Observable, ObservableRow
from .schema import Results
from .sweep_sections import SweepRow


def table(results: Results) -> Table | None:
    """The observables at the learning rate of the next step, a row each; None without any."""
    found = _shown(results)
    if found is None:
        return None
    here, rows = found
    coming = ", the next lr" if here.is_next_lr else ""
    shown = Table(
        title=f"Other observables at eta = {here.eta:.3g}{coming} (±: 95 % over E, given U)",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for column in ("", "at theta", "predicted", "measured", "measured / predicted", "unit"):
        shown.add_column(column, justify="left" if column in {"", "unit"} else "right", no_wrap=True)
    for one, row in rows:
        rounding = here.rounding if row.rounding is None else row.rounding  # of KL as of the entropy
        measured = None if rounding else row.measured_interval_given_U
        some = one.responses < results.counts.E_sequences
        shown.add_row(
            escape(observable_label(one.name)),
            with_half(one.at_theta.value, one.interval),
            with_half(row.predicted.value, row.interval_given_U),
            with_half(row.measured.value, measured) if measured else "-",
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
