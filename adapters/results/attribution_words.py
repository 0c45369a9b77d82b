"""The largest causes of the predicted change in words: only what the numbers and their errors allow."""

from collections.abc import Sequence
from typing import NamedTuple

from .attribution_sections import AttributionSection, Family, PromptOfU, Region, Share
from .lifetime import lifetime_lines
from .module_region import ONE_SIGN
from .momentum import momentum_lines
from .schema import Results

SMALL = 0.005  # of the sum of absolute shares: a part that is not mentioned
MARK = " (indistinguishable from 0)"


class Scale(NamedTuple):
    """From shares to amounts of change: the learning rate of the next step, or 1."""

    eta: float
    unit: str


def causes(results: Results) -> list[str]:
    """Who makes the predicted change, and whose gradients are in its momentum.

    Percentages are of sums whose shares have one sign, nearly; where they have not, amounts with their
    signs are said instead, at the next learning rate or, where that is not known, per unit of it.
    Without an attribution there is a line on momentum at most.
    """
    section, whose = results.attribution, momentum_lines(results.momentum, results.next_lr.value)
    if section is None:
        return whose
    eta, unit = results.next_lr.value, results.entropy.unit
    scale = Scale(eta, unit) if eta else Scale(1.0, section.unit)
    return [f"Causes of the predicted change: {'; '.join(_clauses(section, scale))}", *whose]


def largest_causes(results: Results) -> list[str]:
    """`causes` without momentum and without the parts of the step, which the verdict has."""
    section = results.attribution
    if section is None:
        return []
    eta, unit = results.next_lr.value, results.entropy.unit
    _, *rest = _clauses(section, Scale(eta, unit) if eta else Scale(1.0, section.unit))
    return [f"causes: {'; '.join(rest)}"] if rest else []


def beyond_shares(results: Results) -> list[str]:
    """Where the batch's marginals differ from its shares, what it does later, and what the shares lack.

    No line without an attribution.
    """
    section = results.attribution
    if section is None:
        return []
    eta, unit = results.next_lr.value, results.entropy.unit
    scale = Scale(eta, unit) if eta else Scale(1.0, section.unit)
    rule, clipped = results.conventions.step.rule, results.clip_coefficient < 1
    return [
        *_marginals(section, scale, rule, clipped),
        *lifetime_lines(section.lifetime, results.next_lr, unit, _mark(section.update)),
        _residuals(section.families),
    ]


def _clauses(section: AttributionSection, scale: Scale) -> list[str]:
    """The parts of the step; of this batch the prompts; the modules."""
    parts = {
        "momentum of earlier steps": section.momentum,
        "weight decay": section.decay,
        "this batch": section.update,
    }
    absolute = sum(abs(part.share) for part in parts.values())
    whole = sum(part.share for part in parts.values())
    said = {n: p for n, p in parts.items() if abs(p.share) > SMALL * absolute}
    ordered = sorted(said.items(), key=lambda item: -abs(item[1].share))
    if not said:
        clauses = ["nothing changes to first order"]
        batch = own = "this batch"
    elif all(p.share * whole > 0 for p in said.values()):
        first, *rest = [f"{_percent(p.share / whole)} is {n}{_mark(p)}" for n, p in ordered]
        clauses = [", ".join([first, *rest])]
        batch = f"this batch's {_percent(section.update.share / whole)}"
        own = f"{batch} ({_amount(section.update.share, scale)})"
    else:
        listed = _join([f"{n} {_amount(p.share, scale)}{_mark(p)}" for n, p in ordered])
        clauses = [f"{_amount(whole, scale)} {scale.unit} in all, {listed}"]
        batch = own = f"this batch's {_amount(section.update.share, scale)}"
    if not any(prompt.share for prompt in section.U_prompts):
        clauses.append("this batch has no gradient")
    elif "this batch" in said:
        if list(said) == ["this batch"]:
            clauses, batch = ["all of it is this batch"], "it"
            own = f"its {_amount(section.update.share, scale)}"
        clauses.append(_prompts(section, batch, own, scale))
        clauses += _where(section.update_region, "the batch's part", scale)
        return clauses
    return [*clauses, *_where(section.region, "the whole", scale)]


def _prompts(section: AttributionSection, batch: str, own: str, scale: Scale) -> str:
    """The largest prompt as a share of the batch, or the largest of either sign in amounts.

    `batch` and `own` are what the batch is called, the latter with its amount.
    """
    prompts, whole = section.U_prompts, section.update.share
    first = prompts[0]
    rest = whole - sum(prompt.share for prompt in prompts)
    absolute = sum(abs(prompt.share) for prompt in prompts) + abs(rest)
    absolute = max(absolute, section.U_prompts_absolute)  # the rest may have either sign
    if absolute <= ONE_SIGN * abs(whole) and 0 < first.share / whole <= 1:
        return f"of {batch}, {_called(first)} makes {_percent(first.share / whole)}"
    other = next((p for p in prompts if p.share * first.share < 0), None)
    named = [first] if other is None else [first, other]
    listed = _join([f"{_called(p)} makes {_amount(p.share, scale)}" for p in named])
    return f"within {own}, {listed} {scale.unit}"


def _called(prompt: PromptOfU) -> str:
    """prompt 17 ('What is 8 + 4?', 7 of 8 right)."""
    rewards = ""
    if prompt.right is not None:
        rewards = f", {prompt.right} of {prompt.responses} right"
    elif prompt.mean_reward is not None:
        rewards = f", mean reward {prompt.mean_reward:.3g}"
    return f"prompt {prompt.prompt_index} ({prompt.text}{rewards})"


def _where(region: Region | None, whole: str, scale: Scale) -> list[str]:
    if region is None or region.total.indistinguishable_from_0:
        return []
    place = f"{region.name} ({region.modules} of {region.of_modules} modules)"
    if region.spread > ONE_SIGN:
        amount = f"{_amount(region.total.share, scale)} {scale.unit}"
        return [f"in {whole}, of modules of either sign, {place} makes {amount}"]
    return [f"{_percent(region.fraction)} of {whole} is in {place}"]


def _marginals(section: AttributionSection, scale: Scale, rule: str, clipped: bool) -> list[str]:
    """Shares and marginals of the batch, where they differ by more than their error."""
    if not section.marginals_differ:
        return []
    share, marginal = section.update.share, section.marginals.share
    why = "Adam's second moment, which divides the whole step, grows with the gradient"
    if rule != "adamw":
        why = "entries of the step are bounded"
    elif clipped:
        why += ", and clipping fixes its norm"
    apart = section.marginals_less_shares
    return [
        f"This batch's shares sum to {_amount(share, scale)}{_half(section.update, scale)}, its "
        f"marginals, the derivative in a common weight of all of it, to {_amount(marginal, scale)}"
        f"{_half(section.marginals, scale)} {scale.unit} (difference {_amount(apart.share, scale)}"
        f"{_half(apart, scale)} on the same samples): {why}"
    ]


def _residuals(families: Sequence[Family]) -> str:
    listed = ", ".join(f"{family.name} {family.relative:.0e}" for family in families)
    return f"shares sum to the prediction; residual, relative to the sum of absolute shares: {listed}"


def _percent(fraction: float) -> str:
    percent = 100 * fraction
    if 0 < abs(percent) < 1:
        return "under 1 %"
    return f"{percent:.0f} %"


def _amount(share: float, scale: Scale) -> str:
    return f"{scale.eta * share:+.1e}"


def _half(share: Share, scale: Scale) -> str:
    """With the half width of its interval."""
    return f" ± {scale.eta * share.interval.half_width:.1e}" if share.interval else ""


def _mark(share: Share) -> str:
    return MARK if share.share and share.indistinguishable_from_0 else ""


def _join(items: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))
