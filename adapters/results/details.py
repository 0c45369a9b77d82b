"""Details of a run in words: the derivative and its parts, the curve, the floor, the weights."""

import math
from collections.abc import Iterable

from .quantity import Interval
from .schema import Results
from .sections import LossSection
from .sweep_sections import LinearFit, LinearUntil, SweepRow

OWN_BATCH = "U is the step's own batch, so that v has no error over U"


def about_v(results: Results) -> list[str]:
    """The entropy, what the step lacks of the run's, the loss, the derivative along v and its parts."""
    first, entropy = results.first_order, results.entropy
    lines = [
        f"Entropy at theta: {entropy.value:.4f} ± {_half(results.entropy_interval)} {entropy.unit} "
        "(95 %, over E)"
    ]
    counts, average = results.counts, ", on an average U"
    if counts.U_groups_without_gradient == counts.U_prompts:
        over_U = "no gradient in U, so no error over it: another U may have one"
        loss = results.loss is not None and results.loss.name != "preset"
        why = "The loss has no gradient on U" if loss else "Every advantage of U is 0"
        lines.append(f"{why}: the step is by momentum and weight decay alone")
        next_U = update = ""
    elif not first.se_over_U.value:  # exactly 0 only where U is the batch of the next step itself
        over_U, next_U, update, average = OWN_BATCH, "", "", ""
    else:
        over_U = f"± {_half(first.interval_over_U)} over U"
        next_U = f"; ± {_half(first.interval_next_U)} on the trainer's next U"
        update = f" ± {_half(first.interval_over_U)} over U"
    masks = []
    if first.masks:
        over_U += f"; ± {_half(first.masks.interval_one_step)} over the dropout mask of one step"
        masks.append(
            f"Dropout: v is the mean over {first.masks.count} masks, over which the derivative has "
            f"standard deviation {first.masks.spread.value:.1e}; a step has one mask"
        )
    return [
        *lines,
        *(f"Not the step of the run: {line}" for line in results.unlike_the_run),
        *_loss(results.loss),
        f"Derivative along v: {first.derivative.value:+.4e} ± {_half(first.interval_total)} per unit "
        f"of learning rate{average} (± {_half(first.interval_given_U)} over E, given U; "
        f"{over_U}){next_U}",
        f"Its parts: update {first.from_update.value:+.3e}{update}, "
        f"momentum {first.from_momentum.value:+.3e}, weight decay "
        f"{first.from_weight_decay.value:+.3e}",
        *masks,
    ]


def _loss(loss: LossSection | None) -> list[str]:
    """The loss of U and what its trainer logs, unless 0; no line for a preset."""
    if loss is None or loss.name == "preset":
        return []
    kind = loss.settings.get("loss_type") or loss.settings.get("loss_mode")
    values = {name: x for name, x in loss.metrics.items() if name != "loss" and x}
    logged = "".join(f", {name} {value:.4g}" for name, value in values.items())
    name = f"{loss.name} {kind}" if kind else loss.name
    return [f"Loss of U at theta, {name}: {loss.at_theta.value:.6g}{logged}"]


def _half(interval: Interval | None) -> str:
    """Half the width of a symmetric interval."""
    return "-" if interval is None else f"{interval.half_width:.1e}"


def under_the_table(results: Results) -> list[str]:
    """What first order misses, clipping, the linear range, the numerical floor, the weights."""
    step = results.conventions.step
    lines = []
    for row in (row for row in results.sweep if row.is_next_lr):
        if row.difference_interval and not row.rounding:
            lines.append(
                f"measured - predicted at lr {row.eta:g}, on the same samples: "
                f"{row.difference.value:+.2e} ± {_half(row.difference_interval)}"
            )
    if step.rule == "adamw" and step.max_grad_norm:
        lines.append(
            f"gradient norm {results.norms.Y.value:.3g}, clip coefficient "
            f"{results.clip_coefficient:.3g} at max_grad_norm {step.max_grad_norm:g}"
        )
    return [*lines, *_curve(results), *_weights(results.sweep, results.entropy.unit)]


def _curve(results: Results) -> list[str]:
    """The linear range, the curvature beyond it, and the numerical floor below it."""
    fit, second = results.fit, results.second_order
    lines = [_linear(fit.linear)]
    if line := fit.deviation_against_eta:
        lines.append(
            f"log-log slope of |ratio - 1| against eta: {line.slope:.4f}, R^2 {line.r_squared:.6f}, "
            f"{line.points} points"
        )
    if second:
        until = second.linear_until
        lines.append(
            f"second derivative along v: {second.second_derivative.value:+.3e} ± "
            f"{_half(second.interval_given_U)} ({second.method}, given U): {_until(until)}"
        )
        beyond = [row.eta for row in results.sweep if row.eta > (until.eta or math.inf)]
        if beyond:
            etas = ", ".join(f"{eta:.3g}" for eta in beyond)
            lines.append(f"beyond the range of first order: eta {etas}")
    negative = [row.eta for row in results.sweep if results.entropy.value + row.predicted.value < 0]
    if negative:
        etas = ", ".join(f"{eta:.3g}" for eta in negative)
        lines.append(f"first order predicts a negative entropy, which does not exist: eta {etas}")
    if fit.rounding_eta:
        lines.append(
            f"numerical floor: eta = {fit.rounding_eta.value:.1e}, below which rounding exceeds 10 % "
            "of the measured change"
        )
    return lines


def _until(until: LinearUntil) -> str:
    if until.eta is None:
        return "no curvature"
    if until.high is None:
        interval = f"at least {until.low:.2g}; the second derivative is indistinguishable from 0"
    else:
        interval = f"95 %: {until.low:.2g} to {until.high:.2g}"
    return f"the quadratic term is 10 % of the linear one at eta = {until.eta:.2g} ({interval})"


def _weights(sweep: Iterable[SweepRow], unit: str) -> list[str]:
    """Why a verdict is not "trust", and what was resampled."""
    lines, rows = [], list(sweep)
    for row in rows:
        if row.verdict != "trust":
            lines.append(f"{row.verdict} at eta {row.eta:.3g}: {row.verdict_reason}")
        if found := row.resampled:
            lines.append(
                f"resampled at theta + {row.eta:.3g} v: entropy change {found.change.value:+.4e} ± "
                f"{_half(found.interval)} {unit} (95 %, over E)"
                + (f"; {found.cut_off} responses reached the length limit" if found.cut_off else "")
            )
    worst = [row for row in rows if row.verdict == "resample"]
    if worst and not any(row.resampled for row in worst):
        lines.append("to sample responses there: --set measure.resample=true")
    return lines


def _linear(line: LinearFit) -> str:
    """The linear fit to the measured changes, or why there is none."""
    if line.slope is None:
        return f"no linear fit to the measured changes: {line.reason}"
    r2 = "" if line.r2 is None else f", R^2 {line.r2:.8f}"
    return (
        f"linear fit to the measured changes, eta {line.eta_low:.2g} to {line.eta_high:.2g}: slope "
        f"{line.slope:+.4e} ± {_half(line.slope_interval)}, intercept {line.intercept:+.1e} ± "
        f"{_half(line.intercept_interval)}{r2}, {line.points} points (±: scatter about the line)"
    )
