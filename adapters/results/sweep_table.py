"""The sweep as a table: the next learning rate first, every interval beside its number."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from .digits import with_half
from .schema import Results
from .sweep_sections import SweepRow
from .verdict import verdict_of

WIDE = 112  # columns of a table with the second order
TABLE_HEAD = 4  # lines: the title, two of columns, a rule


def sweep_table(
    results: Results, *, width: int, most: int | None = None, verbose: bool = False
) -> Table:
    """A row a learning rate; of more than `most` the next step's and others in equal steps.

    With `verbose` also the effective sample size and, where there is room, the second order.
    """
    shown = _chosen(results.sweep, most)
    quadratic = verbose and results.second_order is not None and width >= WIDE
    left_out = len(results.sweep) - len(shown)
    more = f"; {left_out} more with -v" if left_out else ""
    table = Table(
        title=f"Change of the entropy, {results.entropy.unit} (±: 95 %){more}",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    over = verdict_of(results).entropy.over
    heads = ["eta", f"predicted\n± over {over}", *(["2nd order"] if quadratic else [])]
    heads += ["measured\n± over E", "measured /\npredicted", *(["ESS"] if verbose else []), "weights"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in shown:
        table.add_row(*_cells(row, verbose=verbose, quadratic=quadratic))
    return table


def _chosen(sweep: Sequence[SweepRow], most: int | None) -> list[SweepRow]:
    """The next step's first; of the others the smallest, the largest, and some between."""
    coming = [row for row in sweep if row.is_next_lr]
    others = [row for row in sweep if not row.is_next_lr]
    room = len(others) if most is None else min(len(others), max(most - len(coming), 1))
    if room == 1:
        return [*coming, others[-1]]
    places = [round(i * (len(others) - 1) / (room - 1)) for i in range(room)]
    return [*coming, *(others[i] for i in places)]


def _cells(row: SweepRow, *, verbose: bool, quadratic: bool) -> list[str]:
    weights: str = "rounding" if row.rounding else row.verdict
    measured, ratio = "-", "-"
    if row.resampled is not None:
        measured, weights = with_half(row.resampled.change.value, row.resampled.interval), "resampled"
    elif row.measured_interval_given_U is not None and not row.rounding:
        measured = with_half(row.measured.value, row.measured_interval_given_U)
        ratio = f"{row.ratio.value:.4f}"
    cells = [
        ("next lr " if row.is_next_lr else "") + f"{row.eta:.3g}",
        with_half(row.predicted.value, row.interval_total),
    ]
    if quadratic:
        cells.append("-" if row.second_order is None else f"{row.second_order.value:+.4e}")
    cells += [measured, ratio]
    return [*cells, *([f"{row.ess.value:.1f}"] if verbose else []), weights]
