"""KL to the base policy at theta, along v, and at theta + eta v; new etas by a pass of their own."""

import math
from functools import partial
from typing import Any

import torch

from funcprobe import tree
from funcprobe.passes.kl import KlAlong, kl_along, kl_at
from funcprobe.policy.reference import base_params
from funcprobe.types import Params

from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..store import Stages
from .batches import Batches
from .like import like_tokens
from .plan import Plan
from .sweep import state_inputs


def kl_of(
    plan: Plan, batches: Batches, direction: Params, stages: Stages, narrator: Narrator
) -> KlAlong:
    """`kl_along` at the plan's etas; one stage for the etas of each run that had new ones."""
    params, E = plan.policy.params, batches.eval_batch
    base = base_params(plan.policy.model, params)
    inputs = {**state_inputs(plan, batches), "direction": direction, "base": base}
    groups = _groups(stages.recall("kl-etas", inputs))
    known = {eta for group in groups for eta in group}
    new = tuple(eta for eta in plan.etas if eta not in known)
    groups += [new] if new or not groups else []
    first, *others = groups

    def along(stage: Stage) -> KlAlong:
        forward = counted(plan.forward, stage, "E")
        return kl_along(params, base, E, direction, forward, first, plan.max_tokens)

    def moved(group: tuple[float, ...], stage: Stage) -> list[torch.Tensor]:
        there = [tree.axpy(eta, direction, params) for eta in group]
        return kl_at(there, base, E, counted(plan.forward, stage, "E"), plan.max_tokens)

    wanted = [group for group in others if not set(group).isdisjoint(plan.etas)]
    passes = 2 + len(first) + sum(1 + len(group) for group in wanted)
    with narrator.phase("KL to the base policy", passes * len(E.prompt_N)) as stage:
        one = like_tokens(E)
        like = KlAlong(one, one, (one,) * len(first))
        found = computed(stages, "kl", {**inputs, "etas": first}, like, along, stage)
        at = dict(zip(first, found.moved, strict=True))
        for group in wanted:
            of_group = computed(
                stages,
                "kl-moved",
                {**inputs, "etas": group},
                [one] * len(group),
                partial(moved, group),
                stage,
            )
            at |= dict(zip(group, of_group, strict=True))
    stages.remember("kl-etas", inputs, groups)
    return found._replace(moved=tuple(at[eta] for eta in plan.etas))


def _groups(stored: Any) -> list[tuple[float, ...]]:
    """The etas of each stage; none for what is no such list."""
    groups = stored if isinstance(stored, list) else []
    if not all(isinstance(group, list) and group for group in groups):
        return []
    known = all(type(eta) is float and math.isfinite(eta) for group in groups for eta in group)
    return [tuple(group) for group in groups] if known else []
