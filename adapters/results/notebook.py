"""What a notebook shows of a run: the verdict, the sweep, the parts of the step, the rules."""

from html import escape
from typing import TYPE_CHECKING

from funcprobe.html_table import html_table

from .frames import FRAMES
from .verdict import verdict_line

if TYPE_CHECKING:
    from .quantity import Interval
    from .saved import SavedRun
    from .schema import Results
    from .sweep_sections import SweepRow
    from .whatif_sections import ChangeSection, RuleRow, WhatIf

BOTH = "95 %, over E and U"
GIVEN_U = "95 %, over E"


def results_html(results: "Results") -> str:
    """The verdict in words, the sweep, and the parts of the step with their intervals where known."""
    return _paragraph(verdict_line(results)) + _sweep(results) + _parts(results)


def run_html(run: "SavedRun") -> str:
    """The same of a run folder, and what else is in it."""
    found = [f"folder {run.folder}", f"made {run.manifest.created} with seed {run.manifest.seed}"]
    if (run.folder / "report.html").is_file():
        found.append("report.html")
    if run.whatif is not None:
        found.append(f"rules compared: {len(run.whatif.rules)} (.whatif)")
    found.append(f"dataframes: .to_pandas(name) of {', '.join(FRAMES)}")
    return results_html(run.results) + _paragraph("; ".join(found))


def whatif_html(whatif: "WhatIf") -> str:
    """Every rule with its predicted and measured change, and what follows in words."""
    rewarded = any(row.reward for row in whatif.rules)
    header = ["rule", "predicted", "measured", GIVEN_U, "less the run's own", GIVEN_U]
    header += ["reward, measured", GIVEN_U] if rewarded else []
    table = html_table(
        f"Change of the entropy by one step at learning rate {whatif.learning_rate.value:g}, "
        f"{whatif.entropy.unit}, from {whatif.entropy.value:.4f}",
        [*header, "importance weights"],
        [_rule(row, rewarded=rewarded) for row in whatif.rules],
    )
    return table + "".join(map(_paragraph, whatif.findings))


def _sweep(results: "Results") -> str:
    header = ("learning rate", "predicted", BOTH, "measured", GIVEN_U, "importance weights")
    return html_table(
        f"Change of the entropy, {results.entropy.unit}, from {results.entropy.value:.4f}",
        header,
        [_row(row) for row in results.sweep],
    )


def _row(row: "SweepRow") -> tuple[str, ...]:
    measured = f"{row.measured.value:+#.3g}" + (" (rounding)" if row.rounding else "")
    return (
        f"{row.eta:g}" + (" (the next step's)" if row.is_next_lr else ""),
        f"{row.predicted.value:+#.3g}",
        _bounds(row.interval_total),
        measured,
        _bounds(row.measured_interval_given_U),
        row.verdict,
    )


def _parts(results: "Results") -> str:
    first, found = results.first_order, results.attribution
    parts = {
        "this batch": (first.from_update.value, found.update if found else None),
        "momentum": (first.from_momentum.value, found.momentum if found else None),
        "weight decay": (first.from_weight_decay.value, found.decay if found else None),
    }
    rows = [
        (name, f"{value:+#.3g}", _bounds(share.interval if share else None))
        for name, (value, share) in parts.items()
    ]
    rows.append(
        (
            "the step",
            f"{first.derivative.value:+#.3g}",
            _bounds(first.interval_given_U),
        )
    )
    return html_table(
        f"Parts of the derivative, {first.derivative.unit}", ("part", "derivative", GIVEN_U), rows
    )


def _rule(row: "RuleRow", *, rewarded: bool) -> tuple[str, ...]:
    reward = _measured(row.reward) if rewarded else ()
    entropy = row.entropy
    return (
        row.rule,
        f"{entropy.predicted.value:+#.3g}",
        *_measured(entropy),
        *_difference(row),
        *reward,
        row.verdict,
    )


def _difference(row: "RuleRow") -> tuple[str, str]:
    """Of the run's own rule from itself none."""
    if row.rule == "own":
        return "", ""
    return f"{row.entropy.difference.value:+#.3g}", _bounds(row.entropy.difference_interval)


def _measured(change: "ChangeSection | None") -> tuple[str, str]:
    if change is None:
        return "", ""
    return f"{change.measured.value:+#.3g}", _bounds(change.measured_interval_given_U)


def _bounds(interval: "Interval | None") -> str:
    return f"{interval.low:+#.3g} to {interval.high:+#.3g}" if interval else ""


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"
