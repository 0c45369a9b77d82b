"""What a run and a check print: tables, and the lines under them."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from funcprobe.checks import Check

from ..machine import cost

WIDE = 112  # columns of the whole table; what is narrower does without the second order


def print_results(document: dict[str, Any], console: Console) -> None:
    """The sanity checks, the table of the sweep, and the lines under it."""
    print_checks([Check(**check) for check in document["checks"]], console, meanings=False)
    rule, unit = document["conventions"]["step"]["rule"], document["entropy"]["unit"]
    what = "of the next step" if rule == "adamw" else f'along v of rule "{rule}"'
    table = Table(
        title=f"Entropy change {what}, {unit}; +-: 95 %, predicted over E and U, measured over E",
        title_justify="left",
    )
    bends = document["second_order"] is not None and console.width >= WIDE
    order = ("2nd order",) if bends else ()
    for column in ("eta", "predicted", "+-", *order, "measured", "+-", "ratio", "ESS", "weights"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in document["sweep"]:
        believed = row["verdict"] != "resample" and not row["rounding"]
        table.add_row(
            f"{row['eta']:.3g}" + (" next lr" if row["is_next_lr"] else ""),
            f"{row['predicted']['value']:+.4e}",
            _half(row["interval_total"]),
            *((f"{row['second_order']['value']:+.4e}",) if bends else ()),
            f"{row['measured']['value']:+.4e}",
            _half(row["measured_interval_given_U"]) if believed else "-",
            f"{row['ratio']['value']:.7f}" if believed else "-",
            f"{row['ess']['value']:.1f}",
            "rounding" if row["rounding"] else row["verdict"],
        )
    console.print(table)
    for line in (*_summary(document), cost.summary(document["cost"])):
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


def _half(interval: dict[str, float]) -> str:
    """Half the width of an interval, which is symmetric."""
    return f"{(interval['high'] - interval['low']) / 2:.1e}"


def _summary(document: dict[str, Any]) -> list[str]:
    first, second = document["first_order"], document["second_moments"]
    step, entropy = document["conventions"]["step"], document["entropy"]
    lines = []
    for row in (row for row in document["sweep"] if row["is_next_lr"]):
        lines.append(
            f"{'next step' if step['rule'] == 'adamw' else 'v'} (lr {row['eta']:g}): entropy "
            f"{entropy['value']:.4f} +- {_half(document['entropy_interval'])} {entropy['unit']}, "
            f"predicted to change by {row['predicted']['value']:+.2e} +- "
            f"{_half(row['interval_total'])}, measured {row['measured']['value']:+.2e}"
            f"{' (rounding)' if row['rounding'] else ''}"
        )
        if row["difference_interval"] and not row["rounding"]:
            lines.append(
                f"measured - predicted on the same samples {row['difference']['value']:+.2e} +- "
                f"{_half(row['difference_interval'])}"
            )
    lines += [
        f"derivative along v {first['derivative']['value']:+.4e} +- {_half(first['interval_total'])} "
        f"per unit of lr (+- {_half(first['interval_given_U'])} over E, U given; "
        f"+- {_half(first['interval_over_U'])} over U)",
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
    return [*lines, *_of_the_curve(document), *_of_the_weights(document)]


def _of_the_curve(document: dict[str, Any]) -> list[str]:
    """Where the curve is straight, where it bends, where rounding ends it."""
    fit, bend = document["fit"], document["second_order"]
    lines = [_linear(fit["linear"])]
    if line := fit["deviation_against_eta"]:
        lines.append(
            f"log-log slope of |ratio - 1| against eta {line['slope']:.4f}, R^2 "
            f"{line['r_squared']:.6f}, {line['points']} points"
        )
    if bend:
        until = bend["linear_until"]
        lines.append(
            f"second derivative {bend['second_derivative']['value']:+.3e} +- "
            f"{_half(bend['interval_given_U'])} ({bend['method']}, U given): {_until(until)}"
        )
        beyond = [row["eta"] for row in document["sweep"] if row["eta"] > (until["eta"] or math.inf)]
        if beyond:
            etas = ", ".join(f"{eta:.3g}" for eta in beyond)
            lines.append(f"beyond it, so not to be predicted by first order: eta {etas}")
    below = [
        row["eta"]
        for row in document["sweep"]
        if document["entropy"]["value"] + row["predicted"]["value"] < 0
    ]
    if below:
        etas = ", ".join(f"{eta:.3g}" for eta in below)
        lines.append(f"the line leads below entropy 0, where there is nothing: eta {etas}")
    if fit["rounding_eta"]:
        lines.append(
            f"rounding takes over below eta = {fit['rounding_eta']['value']:.1e} (10 % of the change)"
        )
    return lines


def _until(until: dict[str, Any]) -> str:
    if until["eta"] is None:
        return "nothing bends"
    if until["high"] is None:
        told = f"at least {until['low']:.2g}: it is not told from 0"
    else:
        told = f"95 %: {until['low']:.2g} to {until['high']:.2g}"
    return f"the quadratic term is 10 % at eta = {until['eta']:.2g} ({told})"


def _of_the_weights(document: dict[str, Any]) -> list[str]:
    """Why a verdict is not "trust", and what was sampled anew."""
    lines, unit = [], document["entropy"]["unit"]
    for row in document["sweep"]:
        if row["verdict"] != "trust":
            lines.append(f"{row['verdict']} at eta {row['eta']:.3g}: {row['verdict_reason']}")
        if found := row["resampled"]:
            lines.append(
                f"sampled at theta + {row['eta']:.3g} v: entropy changes by "
                f"{found['change']['value']:+.4e} +- {_half(found['interval'])} {unit} (95 %, over E)"
                + (f"; {found['cut_off']} responses cut off" if found["cut_off"] else "")
            )
    worst = [row for row in document["sweep"] if row["verdict"] == "resample"]
    if worst and not any(row["resampled"] for row in worst):
        lines.append("to sample responses there: --set measure.resample=true")
    return lines


def _linear(line: dict[str, Any]) -> str:
    """The straight line through the measured changes, or why there is none."""
    if line["slope"] is None:
        return f"no straight line through measured: {line['reason']}"
    r2 = "" if line["r2"] is None else f", R^2 {line['r2']:.8f}"
    return (
        f"straight line through measured, eta {line['eta_low']:.2g} to {line['eta_high']:.2g}: slope "
        f"{line['slope']:+.4e} +- {_half(line['slope_interval'])}, intercept {line['intercept']:+.1e} "
        f"+- {_half(line['intercept_interval'])}{r2}, {line['points']} points "
        "(+-: scatter about the line)"
    )


def verdict(one: Check) -> str:
    """pass, FAIL, or suspect where a check is advisory."""
    return "pass" if one.passed else "suspect" if one.advisory else "FAIL"
