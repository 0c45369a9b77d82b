"""What a run and a check print: tables, and the lines under them."""

from typing import Any

from rich.console import Console
from rich.table import Table

from funcprobe.checks import Check


def print_results(document: dict[str, Any], console: Console) -> None:
    """The sanity checks, the table of the sweep, and the lines under it."""
    print_checks([Check(**check) for check in document["checks"]], console, meanings=False)
    rule, unit = document["conventions"]["step"]["rule"], document["entropy"]["unit"]
    what = "of the next step" if rule == "adamw" else f'along v of rule "{rule}"'
    table = Table(
        title=f"Entropy change {what}, {unit} (+-: 95 % intervals; predicted over E and U, measured "
        "over E)",
        title_justify="left",
    )
    bends = document["second_order"] is not None
    order = ("to 2nd order",) if bends else ()
    for column in ("eta", "predicted", "+-", *order, "measured", "+-", "ratio", "ESS", "weights"):
        table.add_column(column, justify="right")
    for row in document["sweep"]:
        mark = " (next lr)" if row["is_next_lr"] else ""
        bent = (f"{row['second_order']['value']:+.4e}",) if bends else ()
        table.add_row(
            f"{row['eta']:.3g}{mark}",
            f"{row['predicted']['value']:+.4e}",
            _half(row["interval_total"]),
            *bent,
            f"{row['measured']['value']:+.4e}" + (" (rounding)" if row["rounding"] else ""),
            _half(row["measured_interval_given_U"]),
            f"{row['ratio']['value']:.7f}",
            f"{row['ess']['value']:.1f}",
            row["verdict"],
        )
    console.print(table)
    for line in _summary(document):
        console.print(line, soft_wrap=True, markup=False)


def print_checks(seen: list[Check], console: Console, *, meanings: bool = True) -> None:
    """Every check, what it saw and its bound; what a failure usually means, of all or the failed."""
    table = Table(title="Sanity checks", title_justify="left")
    for column in ("", "check", "saw", "bound", *(("a failure usually means",) if meanings else ())):
        table.add_column(column)
    for one in seen:
        meaning = (one.failure_means,) if meanings else ()
        table.add_row(verdict(one), one.name, one.saw, one.bound, *meaning)
    console.print(table)
    print_verdicts(seen, console)


def print_verdicts(seen: list[Check], console: Console) -> None:
    """How many checks passed, and each one that did not, with what that usually means."""
    passed = sum(one.passed for one in seen)
    console.print(f"sanity checks: {passed} of {len(seen)} passed", markup=False)
    for one in seen:
        if not one.passed:
            console.print(
                f"{verdict(one)}: {one.name}: {one.saw}, expected {one.bound}; "
                f"this usually means: {one.failure_means}",
                soft_wrap=True,
                markup=False,
            )


def _half(interval: list[float]) -> str:
    """Half the width of an interval that is symmetric."""
    return f"{(interval[1] - interval[0]) / 2:.1e}"


def _summary(document: dict[str, Any]) -> list[str]:
    first, fit = document["first_order"], document["fit"]
    unit = document["entropy"]["unit"]
    step, second = document["conventions"]["step"], document["second_moments"]
    lines = []
    for row in (row for row in document["sweep"] if row["is_next_lr"]):
        lines.append(
            f"{'next step' if step['rule'] == 'adamw' else 'v'} (lr {row['eta']:g}): entropy "
            f"{document['entropy']['value']:.4f} {unit}, predicted to change by "
            f"{row['predicted']['value']:+.2e} +- {_half(row['interval_total'])}, measured "
            f"{row['measured']['value']:+.2e}{' (rounding)' if row['rounding'] else ''}"
        )
        lines.append(
            f"measured - predicted on the same samples {row['difference']['value']:+.2e} +- "
            f"{_half(row['difference_interval'])}"
        )
    lines += [
        f"derivative along v {first['derivative']['value']:+.4e} per unit of lr, standard error "
        f"{first['se_given_U']['value']:.1e} given U, {first['se_over_U']['value']:.1e} over U",
        f"of it: update {first['from_update']['value']:+.3e}, "
        f"momentum {first['from_momentum']['value']:+.3e}, "
        f"weight decay {first['from_weight_decay']['value']:+.3e}",
    ]
    if step["rule"] == "adamw" and step["max_grad_norm"]:
        lines.append(
            f"gradient norm {document['norms']['Y']['value']:.3g}, clip coefficient "
            f"{document['clip_coefficient']:.3g} at max_grad_norm "
            f"{step['max_grad_norm']:g}"
        )
    if second and second["capped"]:
        lines.append(
            f"{second['capped']} of {document['counts']['trainable_parameters']} scales of P capped at "
            f"{step['max_scale']:g}: set optimizer.max_scale = 0 for P Y itself"
        )
    lines.append(_linear(fit["linear"]))
    if line := fit["deviation_against_eta"]:
        lines.append(
            f"log-log slope of |ratio - 1| against eta {line['slope']:.4f}, R^2 "
            f"{line['r_squared']:.6f}, {line['points']} points"
        )
    bend = document["second_order"]
    if bend:
        star = bend["eta_star"]
        end = f"first order ends at eta* = {star['value']:.2g}" if star else "nothing bends"
        lines.append(
            f"second derivative {bend['second_derivative']['value']:+.3e} +- "
            f"{_half(bend['interval_given_U'])} (given U, {bend['method']}): {end}"
        )
    if fit["rounding_eta"]:
        lines.append(
            f"rounding takes over below eta = {fit['rounding_eta']['value']:.1e} (10 % of the change)"
        )
    for row in document["sweep"]:
        if row["verdict"] != "trust":
            lines.append(f"{row['verdict']} at eta {row['eta']:.3g}: {row['verdict_reason']}")
        if row["resampled"]:
            lines.append(
                f"sampled again at eta {row['eta']:.3g}: {row['resampled']['change']['value']:+.4e} +- "
                f"{_half(row['resampled']['interval'])}"
            )
    if not any(row["resampled"] for row in document["sweep"]) and any(
        row["verdict"] == "resample" for row in document["sweep"]
    ):
        lines.append("to sample responses there: --set measure.resample=true")
    return lines


def _linear(line: dict[str, Any]) -> str:
    """The straight line through the measured changes, or why there is none."""
    if line["slope"] is None:
        return f"no straight line through measured: {line['reason']}"
    r2 = "" if line["r2"] is None else f", R^2 {line['r2']:.8f}"
    return (
        f"measured against eta from {line['eta_low']:.2g} to {line['eta_high']:.2g}: slope "
        f"{line['slope']:+.4e} +- {_half(line['slope_ci'])}, intercept {line['intercept']:+.1e} +- "
        f"{_half(line['intercept_ci'])}{r2}, {line['points']} points"
    )


def verdict(one: Check) -> str:
    """pass, FAIL, or suspect where a check is advisory."""
    return "pass" if one.passed else "suspect" if one.advisory else "FAIL"
