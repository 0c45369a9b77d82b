"""An attribution and its batches -> the section of results.json on who makes the predicted change."""

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

import funcprobe
from funcprobe.attribution.module_errors import ModuleErrors, PartErrors, block_error
from funcprobe.attribution.module_shares import Parts, module_of
from funcprobe.statistics.intervals import Error
from funcprobe.statistics.weights import by_unit

from ..stages.first_order import Predicted
from .attribution_sections import (
    AttributionSection,
    Family,
    GroupShare,
    PromptOfE,
    PromptOfU,
    Region,
    Share,
)
from .lifetime import lifetime_section
from .module_region import region
from .prompt_texts import prompt_texts, shortened
from .quantity import student_interval

LARGEST = 10  # prompts and modules that are listed
NEGLIGIBLE = 0.01  # a difference of marginals and shares, relative to the larger, that is not said


def attribution_section(
    found: Predicted, attribution: funcprobe.Attribution | None
) -> AttributionSection | None:
    """The content of results.json's `attribution`; None if attribution.level is "off"."""
    plan = found.plan
    level = plan.config.attribution.level
    if attribution is None or level == "off":
        return None
    errors, parts, modules = attribution.errors, attribution.parts, attribution.modules
    assert errors is not None  # with attribution E is passed in blocks
    less = attribution.marginal.total - parts.update
    difference = share_of(less, errors.difference)
    larger = max(abs(attribution.marginal.total), abs(parts.update))
    terms = (
        attribution.evaluation.direct,
        attribution.evaluation.score,
        attribution.evaluation.control,
    )
    lifetime = lifetime_section(found, attribution)
    direct, score, control = (share_of(term.derivative, term.error) for term in terms)
    return AttributionSection(
        level=level,
        unit=f"nats per {plan.entropy.per} per unit of learning rate",
        momentum=share_of(parts.momentum, errors.total.momentum),
        decay=share_of(parts.decay, errors.total.decay),
        update=share_of(parts.update, errors.total.update),
        whole=share_of(parts.total, errors.total.total),
        lifetime=lifetime,
        dropout=attribution.dropout,
        marginals=share_of(attribution.marginal.total, errors.marginal),
        marginals_less_shares=difference,
        marginals_differ=abs(less) > NEGLIGIBLE * larger and not difference.indistinguishable_from_0,
        U_prompts=_prompts_of_U(found, attribution, lifetime.factor),
        U_prompts_absolute=float(attribution.update.prompt_M.abs().sum()),
        modules=_largest(_groups(modules.module, errors.module)),
        layers=_groups(modules.layer, errors.layer),
        projections=_groups(modules.projection, errors.projection),
        factors=_groups(modules.factor, errors.factor),
        region=_region({n: p.total for n, p in modules.module.items()}, errors, slice(0, 3)),
        update_region=_region({n: p.update for n, p in modules.module.items()}, errors, slice(2, 3)),
        E_prompts=_prompts_of_E(found, attribution),
        direct=direct,
        score=score,
        control=control,
        families=families(attribution),
        blocks=len(errors.influence.value_KTd),
    )


def share_of(share: float, error: Error | None) -> Share:
    """A share with its interval; one of exactly 0, as weight decay's where there is none, is 0."""
    if error is None:
        return Share(share=share, se=None, interval=None, indistinguishable_from_0=None)
    interval = student_interval(share, error)
    holds_0 = interval.low <= 0 <= interval.high
    return Share(share=share, se=error.se, interval=interval, indistinguishable_from_0=holds_0)


def families(attribution: funcprobe.Attribution) -> tuple[Family, ...]:
    """Every family of shares: its sum, the residual of that, the sum of absolute shares."""
    parts, rest = attribution.parts, attribution.dropout
    tensors = torch.tensor([p.total for p in attribution.modules.tensor.values()], dtype=torch.float64)
    others = torch.tensor([parts.momentum, parts.decay, rest], dtype=torch.float64)
    shares = {
        "parts of v": torch.tensor([*parts], dtype=torch.float64),
        "momentum, decay and tokens of U": torch.cat([others, attribution.update.token_NR.flatten()]),
        "tensors": tensors,
        "tokens of E": attribution.evaluation.tokens.token_NR.flatten(),
    }
    return tuple(_family(name, each, attribution.derivative) for name, each in shares.items())


def _family(name: str, shares: Tensor, derivative: float) -> Family:
    total, absolute = math.fsum(shares.tolist()), float(shares.abs().sum())
    residual = total - derivative
    relative = abs(residual) / absolute if absolute else 0.0
    return Family(name=name, sum=total, residual=residual, sum_absolute=absolute, relative=relative)


def _groups(shares: Mapping[str, Parts], errors: Mapping[str, PartErrors]) -> tuple[GroupShare, ...]:
    return tuple(
        GroupShare(
            name=name,
            total=share_of(parts.total, errors[name].total),
            momentum=parts.momentum,
            decay=parts.decay,
            update=share_of(parts.update, errors[name].update),
        )
        for name, parts in shares.items()
    )


def _largest(groups: Sequence[GroupShare]) -> tuple[GroupShare, ...]:
    return tuple(sorted(groups, key=lambda group: -abs(group.total.share))[:LARGEST])


def _region(value: Mapping[str, float], errors: ModuleErrors, parts: slice) -> Region | None:
    """Where most of some parts of v is; `parts` are theirs in the influence values."""
    found = region(value)
    if found is None:
        return None
    inside = [name for name in errors.influence.names if module_of(name) in set(found.modules)]
    error = block_error(errors.influence.of(inside)[:, parts].sum(1))
    absolute = math.fsum(map(abs, value.values()))
    return Region(
        name=found.name,
        modules=len(found.modules),
        of_modules=len(value),
        fraction=found.fraction,
        total=share_of(math.fsum(value[m] for m in found.modules), error),
        spread=absolute / abs(math.fsum(value.values())),
    )


def _prompts_of_U(
    found: Predicted, attribution: funcprobe.Attribution, factor: float | None
) -> tuple[PromptOfU, ...]:
    batch = found.batches.update_rollouts
    text = prompt_texts(found.plan, batch, found.plan.supplied_update is not None)
    values = {r for r in batch.reward or [] if not math.isnan(r)}
    least = found.plan.config.reward.correct_at
    shares, marginals = attribution.update.prompt_M, attribution.marginal.prompt_M
    prompts = []
    for m in shares.abs().argsort(descending=True, stable=True)[:LARGEST].tolist():
        index = int(attribution.update.prompt_index_M[m])
        rows = [i for i, prompt in enumerate(batch.prompt_index) if prompt == index]
        rewards = [r for i in rows if batch.reward and not math.isnan(r := batch.reward[i])]
        mean = fmean(rewards) if rewards else None
        advantages = [batch.advantage[i] for i in rows] if batch.advantage else []
        prompts.append(
            PromptOfU(
                prompt_index=index,
                text=shortened(text[index]),
                responses=len(rows),
                tokens=sum(len(batch.response_ids[i]) for i in rows),
                mean_reward=mean,
                right=_right(rewards, values, least) if len(rewards) == len(rows) else None,
                above_mean=None if mean is None else sum(r > mean for r in rewards),
                advantage_low=min(advantages, default=None),
                advantage_high=max(advantages, default=None),
                share=float(shares[m]),
                marginal=float(marginals[m]),
                later=None if factor is None else factor * float(shares[m]),
            )
        )
    return tuple(prompts)


def _right(rewards: Sequence[float], values: Collection[float], correct_at: float) -> int | None:
    """How many of a prompt's rewards are the larger of U's two; None unless only that one is right."""
    if len(values) != 2 or not min(values) < correct_at <= max(values):
        return None
    return sum(r >= correct_at for r in rewards)


def _prompts_of_E(found: Predicted, attribution: funcprobe.Attribution) -> tuple[PromptOfE, ...]:
    batch, E = found.batches.eval_rollouts, found.batches.eval_batch
    text = prompt_texts(found.plan, batch, found.plan.supplied_eval is not None)
    tokens, prompt_se_M = attribution.evaluation.tokens, attribution.evaluation.prompt_se_M
    count_M = by_unit(torch.ones(len(E.prompt_N)), E.prompt_N)
    length_M = by_unit(E.response_length_N.double(), E.prompt_N)
    units = len(found.unit_N.unique())
    prompts = []
    for m in tokens.prompt_M.abs().argsort(descending=True, stable=True)[:LARGEST].tolist():
        index, draws = int(tokens.prompt_index_M[m]), int(count_M[m])
        error = _error_of_prompt(float(prompt_se_M[m]), draws, units)
        prompts.append(
            PromptOfE(
                prompt_index=index,
                text=shortened(text[index]),
                responses=draws,
                tokens=int(length_M[m]),
                total=share_of(float(tokens.prompt_M[m]), error),
            )
        )
    return tuple(prompts)


def _error_of_prompt(se: float, draws: int, units: int) -> Error:
    """With `variance_dof` of influence values that are 0, nearly, but for this prompt's draws."""
    return Error(se, min(2 * draws, units - 1))
