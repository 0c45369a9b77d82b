"""The influence of U's prompts on E's -> the section of results.json on it."""

import math

import funcprobe
from funcprobe.attribution.module_shares import module_of
from funcprobe.statistics.intervals import delta_error

from ..stages.first_order import Predicted
from .attribution import LARGEST, share_of
from .influence_sections import InfluenceSection, InfluentialPrompt, ModuleOfShare, PairOfPrompts
from .module_region import ONE_SIGN, region
from .prompt_texts import prompt_texts, shortened


def influence_section(
    found: Predicted, influence: funcprobe.Influence | None
) -> InfluenceSection | None:
    """The content of results.json's `influence`; None if none was asked for, or U has no gradient."""
    if influence is None:
        return None
    plan, batches = found.plan, found.batches
    of_U = prompt_texts(plan, batches.update_rollouts, plan.supplied_update is not None)
    of_E = prompt_texts(plan, batches.eval_rollouts, plan.supplied_eval is not None)
    prompts = []
    for m, share, tensors in zip(
        influence.column_M.tolist(), influence.share_M, influence.tensor_M, strict=True
    ):
        modules = dict.fromkeys(map(module_of, tensors), 0.0)
        for name, value in tensors.items():
            modules[module_of(name)] += value
        alike = math.fsum(map(abs, modules.values())) <= ONE_SIGN * abs(math.fsum(modules.values()))
        where = region(modules) if alike else None
        ordered = sorted(modules.items(), key=lambda item: -abs(item[1]))[:LARGEST]
        prompts.append(
            InfluentialPrompt(
                prompt_index=m,
                text=shortened(of_U[m]),
                share=share_of(share.derivative, delta_error(share.influence_N, found.unit_N)),
                region=None if where is None else where.name,
                modules=tuple(ModuleOfShare(name=name, share=value) for name, value in ordered),
            )
        )
    pairs = [
        PairOfPrompts(
            E_prompt=pair.row,
            E_text=shortened(of_E[pair.row]),
            U_prompt=pair.column,
            U_text=shortened(of_U[pair.column]),
            influence=pair.influence,
        )
        for pair in funcprobe.top_pairs(influence, LARGEST)
    ]
    unit = f"nats per {plan.entropy.per} per unit of learning rate"
    return InfluenceSection(unit=unit, prompts=tuple(prompts), pairs=tuple(pairs))
