"""Whose momentum, from a run's stage -> results.json, and in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from .module_region import ONE_SIGN
from .momentum_sections import (
    MomentumPrompt,
    MomentumSection,
    MomentumSince,
    MomentumStep,
    MomentumStepPrompts,
)
from .prompt_texts import prompt_texts, shortened

if TYPE_CHECKING:
    from ..stages.first_order import Predicted
    from ..stages.momentum import Momentum, StepPrompts
    from ..stages.plan import Plan

PER_LR = " per unit of learning rate"
MOST = 10  # prompts of a step
NAMED = 5  # steps in a line


def momentum_section(found: "Predicted", momentum: "Momentum | None") -> MomentumSection | None:
    """The section; None if nothing is recorded."""
    if momentum is None:
        return None
    plan, whole, by_step = found.plan, found.prediction.from_momentum, momentum.by_step
    since = None
    if momentum.since is not None and momentum.earlier_step is not None:
        since = MomentumSince(step=momentum.earlier_step, **momentum.since._asdict())
    return MomentumSection(
        unit=f"nats per {plan.entropy.per}{PER_LR}",
        momentum=whole,
        by_step=tuple(
            MomentumStep(
                step=momentum.taken - ago,
                steps_ago=ago + 1,
                share=share,
                fraction=share / whole if whole else None,
            )
            for ago, share in enumerate(by_step.by_step if by_step else ())
        ),
        before=by_step.before if by_step else None,
        all_steps=by_step is not None and len(by_step.by_step) == momentum.taken,
        unexplained=by_step.rest if by_step else None,
        by_prompt=tuple(_prompts(plan, one) for one in momentum.prompts),
        earlier=since,
    )


def _prompts(plan: "Plan", one: "StepPrompts") -> MomentumStepPrompts:
    shares, texts = one.found.shares, prompt_texts(plan, one.rollouts, supplied=True)
    order = torch.argsort(shares.prompt_M.abs(), descending=True, stable=True)[:MOST].tolist()
    return MomentumStepPrompts(
        step=one.step,
        recorded=one.found.recorded,
        recomputed=shares.total,
        residual=one.found.residual,
        gradient_residual=one.found.gradient_residual,
        clip_coefficient=one.found.clip_coefficient,
        absolute=float(shares.prompt_M.abs().sum()),
        prompts=tuple(
            MomentumPrompt(
                prompt_index=(index := int(shares.prompt_index_M[m])),
                text=shortened(texts[index]),
                responses=one.rollouts.prompt_index.count(index),
                share=float(shares.prompt_M[m]),
            )
            for m in order
        ),
    )


def momentum_lines(section: MomentumSection | None, eta: float) -> list[str]:
    """By step, before and after an earlier checkpoint, and the largest prompts with the residual.

    Percentages of the momentum part where its parts have one sign, nearly; else changes of the entropy
    at the learning rate `eta`, per unit of it where that is 0.
    """
    if section is None:
        return []
    said = _Said(eta, section.unit)
    lines = []
    if section.by_step:
        lines.append(f"momentum by step: {_by_step(section, said)}")
    if section.earlier is not None:
        step, *parts = section.earlier.step, section.earlier.since, section.earlier.before
        names = [f"since step {step}", "of that step and before"]
        lines.append(f"momentum by checkpoint: {said(names, parts, section.momentum)}")
    for one in section.by_prompt:
        shown = one.prompts[:3]
        parts = [prompt.share for prompt in shown]
        listed = said([prompt.text for prompt in shown], parts, one.recorded, one.absolute)
        lines.append(
            f"momentum of step {one.step} by prompt: {listed}; residual {one.residual:+.1e} of "
            f"{one.recorded:+.3e} (gradient recomputed to {one.gradient_residual:.1e})"
        )
    return lines


class _Said(NamedTuple):
    """Parts of a whole: as percentages, or where signs differ as changes at a learning rate."""

    eta: float
    unit: str  # per unit of learning rate

    def __call__(
        self, names: Sequence[str], parts: Sequence[float], whole: float, absolute: float = 0.0
    ) -> str:
        """`absolute`: the sum of all absolute parts, where more than those named are known."""
        left = whole - sum(parts)
        if 0 < max(sum(map(abs, [*parts, left])), absolute) <= ONE_SIGN * abs(whole):
            pairs = zip(names, parts, strict=True)
            return ", ".join(f"{name} {100 * part / whole:.0f} %" for name, part in pairs)
        amounts = [f"{(self.eta or 1.0) * part:+.1e}" for part in parts]
        unit = self.unit
        if self.eta:
            unit = f"{unit.removesuffix(PER_LR)} at lr {self.eta:g}"
        listed = ", ".join(f"{name} {x}" for name, x in zip(names, amounts, strict=True))
        return f"{listed} {unit}"


def _by_step(section: MomentumSection, said: _Said) -> str:
    assert section.before is not None  # with by_step
    shares = [step.share for step in section.by_step]
    rest = [] if section.all_steps else [section.before]
    hidden = [sum(shares[NAMED:])] if len(shares) > NAMED else []
    names = [_ago(step.steps_ago) for step in section.by_step[:NAMED]]
    names += [f"{NAMED + 1} to {len(shares)} steps ago"] * len(hidden)
    names += ["before the first recorded"] * len(rest)
    listed = said(names, [*shares[:NAMED], *hidden, *rest], section.momentum)
    if not section.all_steps:
        return listed
    return (
        f"{listed}; these are all {len(shares)} steps of the run (unexplained of the first moment: "
        f"{section.unexplained:.0e})"
    )


def _ago(steps: int) -> str:
    return "1 step ago" if steps == 1 else f"{steps} steps ago"
