"""Whose momentum: by recorded step, by prompts of the last of them, by an earlier checkpoint."""

from typing import Any, NamedTuple

import torch

import funcprobe
from funcprobe.attribution.token_shares import token_shares
from funcprobe.step.objective import update_batch
from funcprobe.types import Params, UpdateBatch

from .. import rollouts
from ..checkpoint.padding import as_trained
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..rollouts import Rollouts
from ..rollouts.gradients import RecordedGradient, load_gradient
from ..store import Stages
from .chosen_loss import choose_loss
from .first_order import Predicted, step_inputs
from .like import like, like_tokens
from .loss import with_loss
from .plan import Plan
from .recorded_steps import RecordedSteps


class StepPrompts(NamedTuple):
    """One recorded step by its prompts."""

    step: int
    rollouts: Rollouts
    found: funcprobe.RecomputedStep


class Momentum(NamedTuple):
    """<X, v_momentum> by where it is from, per unit of eta; None, or empty, where that is not known."""

    taken: int  # steps
    by_step: funcprobe.MomentumSteps | None  # of the last steps, newest first
    prompts: tuple[StepPrompts, ...]
    earlier_step: int | None
    since: funcprobe.MomentumSince | None


def momentum_of(
    found: Predicted, recorded: RecordedSteps | None, stages: Stages, narrator: Narrator
) -> Momentum | None:
    """The split of the momentum part; None without recorded steps and earlier checkpoint.

    By step without a pass; by prompt one gradient and one pass of tangents over each step's rollouts,
    at the parameters before that step.
    """
    if recorded is None:
        return None
    plan, X, Y = found.plan, found.passes.X, found.passes.Y
    params, state = plan.policy.params, plan.adam_state
    by_step = since = None
    if recorded.files:
        each = (load_gradient(path, params).gradient for path in recorded.files.values())
        by_step = funcprobe.momentum_by_step(X, params, Y, state, each, step=plan.step)
    if recorded.earlier is not None:
        since = funcprobe.momentum_since(X, params, Y, state, recorded.earlier, step=plan.step)
    prompts = tuple(
        StepPrompts(step, batch, _recomputed(found, recorded, step, batch, stages, narrator))
        for step, batch in recorded.rollouts.items()
    )
    earlier = None if recorded.earlier is None else max(recorded.earlier.step.values())
    return Momentum(recorded.taken, by_step, prompts, earlier, since)


def _recomputed(
    found: Predicted,
    recorded: RecordedSteps,
    step: int,
    batch: Rollouts,
    stages: Stages,
    narrator: Narrator,
) -> funcprobe.RecomputedStep:
    plan, params = found.plan, found.plan.policy.params
    file = load_gradient(recorded.files[step], params)
    theta = {n: t.to(params[n]) for n, t in file.params.items()}
    update = _update_then(found, batch, theta, stages, narrator)
    inputs = {
        **step_inputs(plan, found.batches),
        "X": found.passes.X,
        "theta": theta,
        "gradient": file.gradient,
        "then": [update.batch, update.coef_NR, update.entropy_coef_NR],
        "ago": recorded.taken - step,
        "max_grad_norm": file.max_grad_norm,
    }
    with narrator.phase("momentum by prompt", 2 * len(update.batch.prompt_N)) as stage:

        def compute(stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
            made = _passes(
                found, file, theta, update, recorded.taken - step, counted(plan.forward, stage, "U")
            )
            numbers = (made.recorded, made.gradient_residual, made.clip_coefficient)
            return made.shares.token_NR, torch.tensor(numbers, dtype=torch.float64)

        shapes = (like_tokens(update.batch), like(3))
        kept = computed(stages, f"momentum-{step}", inputs, shapes, compute, stage)
    token_NR, numbers = kept
    of_step, residual, clip = numbers.tolist()
    return funcprobe.RecomputedStep(of_step, token_shares(token_NR, update.batch), residual, clip)


def _passes(
    found: Predicted,
    file: RecordedGradient,
    theta: Params,
    update: UpdateBatch,
    ago: int,
    forward: funcprobe.Forward,
) -> funcprobe.RecomputedStep:
    plan, X = found.plan, found.passes.X
    scale = funcprobe.moment_scale(plan.policy.params, found.passes.Y, plan.adam_state, plan.step)
    given: dict[str, Any] = {"max_grad_norm": file.max_grad_norm, "max_tokens": plan.max_tokens}
    forward = as_trained(forward, plan.policy.padding)
    return funcprobe.recomputed_step(
        X, scale, plan.adam_state, file.gradient, ago, theta, update, forward, **given
    )


def _update_then(
    found: Predicted, batch: Rollouts, theta: Params, stages: Stages, narrator: Narrator
) -> UpdateBatch:
    """U of an earlier step, with the coefficients of its loss at the parameters before it."""
    plan = found.plan
    advantage_N = torch.tensor(batch.advantage, dtype=torch.float64)
    update = update_batch(
        rollouts.to_batch(batch),
        advantage_N,
        plan.objective.normalisation,
        plan.objective.constant,
    )
    then: Plan = plan._replace(
        policy=plan.policy._replace(params=theta),
        supplied_update=batch,
        known_step=True,
        loss=choose_loss(plan.config, batch),
    )
    batches = found.batches._replace(update_rollouts=batch, update=update)
    return with_loss(then, batches, stages, narrator).update
