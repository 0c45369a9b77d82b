"""What the next step does to the entropy, how sure that is, and what makes it: a verdict to act on."""

import math

from funcprobe.statistics.intervals import Error

from ..config.estimation import observable_label
from .digits import signed
from .needed import MOST, needed
from .observable_sections import Observable
from .quantity import Interval, Quantity, StudentInterval
from .schema import Results
from .verdict_sections import Cause, Effect, Verdict

UNKNOWN = "sign not established"
SMALL = 0.005  # of the sum of absolute parts: a part that is left out


def verdict_of(results: Results) -> Verdict:
    """The verdict as the run wrote it; of an earlier version's results, from their other numbers.

    To first order, at the next step's learning rate. The interval is `first_order.interval_total`,
    along the step of an average U, over the draws of E and the prompts of U; relative to the entropy at
    theta, whose own error scales it and is left out. Batches that would tell: `needed.needed`.
    """
    if results.verdict is not None:
        return results.verdict
    first, eta = results.first_order, results.next_lr.value
    scale, unit = (eta, results.entropy.unit) if eta else (1.0, first.derivative.unit)
    masks = first.masks
    entropy = Effect(
        name="entropy",
        unit=unit,
        at_theta=results.entropy.value,
        change=scale * first.derivative.value,
        low=scale * first.interval_total.low,
        high=scale * first.interval_total.high,
        over=covered(results),
        established=_excludes_0(first.interval_total),
        needed=needed(
            first.derivative.value,
            _error(first.se_given_U, first.interval_given_U),
            results.counts.E_sequences,
            _error(first.se_over_U, first.interval_over_U),
            results.counts.U_prompts,
            _error(masks.se_one_step, masks.interval_one_step) if masks else None,
        ),
    )
    before = results.entropy.value
    relative = before > 0 and eta
    rule = results.conventions.step.rule
    return Verdict(
        step="the next step" if rule == "adamw" else f'a step along v of rule "{rule}"',
        eta=eta or None,
        relative=entropy.change / before if relative else None,
        low=entropy.low / before if relative else None,
        high=entropy.high / before if relative else None,
        established=entropy.established,
        needed=entropy.needed,
        entropy=entropy,
        causes=_causes(results, scale),
        without_gradient=results.counts.U_groups_without_gradient == results.counts.U_prompts,
        observables=tuple(_effect(one, scale, results) for one in results.observables),
        doubts=tuple(_doubts(results, entropy)),
    )


def verdict_line(results: Results) -> str:
    """Of the entropy, in one line, as "entropy -3.5 % per step (95 %: -8.6 to +1.6), sign ..."."""
    verdict = verdict_of(results)
    return ": ".join(filter(None, (doubts_line(verdict), entropy_line(verdict))))


def doubts_line(verdict: Verdict) -> str:
    """What speaks against relying on the prediction; empty if nothing does."""
    return f"do not rely on this ({'; '.join(verdict.doubts)})" if verdict.doubts else ""


def entropy_line(verdict: Verdict) -> str:
    """The change of the entropy, and what makes it."""
    return "; ".join([effect_line(verdict.entropy, verdict), *_causes_of(verdict)])


def beside_the_change(verdict: Verdict) -> str:
    """What `entropy_line` says beyond the change and its interval; empty if that is nothing."""
    effect = verdict.entropy
    open_ = not effect.established and effect.low != effect.high
    telling = _telling(effect, verdict).removeprefix(UNKNOWN).removeprefix(": ") if open_ else ""
    return "; ".join(filter(None, (telling, *_causes_of(verdict))))


def effect_line(effect: Effect, verdict: Verdict) -> str:
    """What the step does to one quantity: change, interval, and whether its sign is known.

    The entropy in per cent of its value at theta, where the learning rate is known; an observable in
    its own unit, beside its value.
    """
    relative = effect.name == verdict.entropy.name and verdict.relative is not None
    scale = 100 / effect.at_theta if relative else 1.0
    change, low, high = signed(*(scale * x for x in (effect.change, effect.low, effect.high)))
    unit = "%" if relative else "" if effect.unit == effect.name else effect.unit
    said = " ".join(filter(None, (effect.name, change, unit)))
    if verdict.eta is not None:
        said += " per step" if relative else f" from {effect.at_theta:.4g}"
    over = {"E and U": "", "E, U given": ", U given"}.get(effect.over, f" over {effect.over}")
    if effect.low == effect.high:
        return f"{said}, equal in all of E"
    said += f" (95 %{over}: {low} to {high})"
    if effect.established:
        return f"{said}, it {'falls' if effect.change < 0 else 'rises'}"
    return f"{said}, {_telling(effect, verdict)}"


def _telling(effect: Effect, verdict: Verdict) -> str:
    """What is known of a change whose interval holds 0, and which batches would tell its sign."""
    found = effect.needed
    if found is None:
        return UNKNOWN
    prompts = f"some {_some(found.U_prompts)} prompts of U" if found.U_prompts else ""
    responses = f"some {_some(found.E_responses)} responses of E" if found.E_responses else ""
    if prompts or responses:
        return f"{UNKNOWN}: {' and '.join(filter(None, (prompts, responses)))} would tell"
    known = UNKNOWN if found.kind == "beyond" else "indistinguishable from 0"
    if effect.name != verdict.entropy.name:
        return known
    largest, unit = max(abs(effect.low), abs(effect.high)), effect.unit
    if verdict.relative is not None:
        largest, unit = 100 * largest / effect.at_theta, "%"
    known += f", a change of up to {largest:.2g} {unit} cannot be excluded"
    more = f": batches more than {MOST} times as large would tell"
    return known + (more if found.kind == "beyond" else "")


def _some(count: int | None) -> str:
    """With two digits, rounded up: it is an estimate."""
    if count is None or count < 100:
        return str(count)
    power = 10 ** (len(str(count)) - 2)
    return f"{math.ceil(count / power) * power:,}"


def _causes_of(verdict: Verdict) -> list[str]:
    without = ["this U has no gradient, another may have one"] if verdict.without_gradient else []
    return [*_made_by(verdict), *without]


def _made_by(verdict: Verdict) -> list[str]:
    """The parts of the step, in per cent of the change; where they have either sign, as changes."""
    if not verdict.causes:
        return []
    if verdict.causes[0].fraction is not None:
        return [", ".join(f"{_percent(c.fraction or 0)} {c.name}" for c in verdict.causes)]
    entropy = verdict.entropy
    scale, unit = (1.0, entropy.unit) if verdict.relative is None else (100 / entropy.at_theta, "%")
    return [", ".join(f"{c.name} {scale * c.change:+.2g} {unit}" for c in verdict.causes)]


def _percent(fraction: float) -> str:
    return "under 1 %" if fraction < 0.01 else f"{100 * fraction:.0f} %"


def _causes(results: Results, scale: float) -> tuple[Cause, ...]:
    first = results.first_order
    parts = {
        "this batch": first.from_update.value,
        "momentum": first.from_momentum.value,
        "weight decay": first.from_weight_decay.value,
    }
    whole, absolute = sum(parts.values()), sum(map(abs, parts.values()))
    kept = {name: part for name, part in parts.items() if abs(part) > SMALL * absolute}
    alike = all(part * whole > 0 for part in kept.values())
    return tuple(
        Cause(name=name, change=scale * part, fraction=part / whole if alike else None)
        for name, part in sorted(kept.items(), key=lambda item: -abs(item[1]))
    )


def _effect(one: Observable, scale: float, results: Results) -> Effect:
    """Of an observable, whose error over U is not known."""
    interval = one.interval_given_U
    return Effect(
        name=observable_label(one.name),
        unit=one.at_theta.unit if results.next_lr.value else one.derivative.unit,
        at_theta=one.at_theta.value,
        change=scale * one.derivative.value,
        low=scale * interval.low,
        high=scale * interval.high,
        over="E, U given",
        established=_excludes_0(interval),
        needed=needed(one.derivative.value, _error(one.se_given_U, interval), one.responses),
    )


def covered(results: Results) -> str:
    """What `first_order.interval_total`, of the entropy's change, covers."""
    first = results.first_order
    if first.masks:
        return "E, U and masks" if first.se_over_U.value else "E and masks"
    return "E and U" if first.se_over_U.value else "E"


def _doubts(results: Results, entropy: Effect) -> list[str]:
    """Why the prediction is not to be relied on, if anything speaks against it."""
    doubts, eta = [], results.next_lr.value
    if failed := [one.name for one in results.checks if not one.passed and not one.advisory]:
        doubts.append(f"sanity checks failed: {', '.join(failed)}")
    until = results.second_order.linear_until.eta if results.second_order else None
    if until is not None and eta > until:
        doubts.append(f"the learning rate is beyond the range of first order, eta = {until:.2g}")
    if eta and entropy.at_theta + entropy.change < 0:
        doubts.append("it predicts a negative entropy, which does not exist")
    for row in (row for row in results.sweep if row.is_next_lr):
        measured = row.measured_interval_given_U
        distinct = measured is not None and not row.rounding and _excludes_0(measured)
        if distinct and row.measured.value * row.predicted.value < 0:
            doubts.append("the measured change has the opposite sign")
    return doubts


def _error(se: Quantity, interval: StudentInterval) -> Error:
    return Error(se.value, interval.degrees_of_freedom)


def _excludes_0(interval: Interval) -> bool:
    return interval.low * interval.high > 0
