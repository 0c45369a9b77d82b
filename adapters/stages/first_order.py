"""From sampling to the prediction: the batches, the gradient of U, the passes of first order."""

from typing import Any, NamedTuple

import torch

import funcprobe
from funcprobe import tree
from funcprobe.passes.block_gradients import Blocks
from funcprobe.statistics import baselines
from funcprobe.statistics.blocks import random_blocks
from funcprobe.step.masked import StepParts
from funcprobe.types import Params

from ..checkpoint.padding import as_trained
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..sampling.drawing import derived_seed
from ..store import Stages
from .batches import Batches, sample
from .gradient import gradients_on_U, verify_state
from .like import like, like_gradient, like_stats, like_tokens
from .loss import with_loss
from .plan import Plan
from .sweep import state_inputs


class Predicted(NamedTuple):
    """A prediction, with everything that it was made from."""

    plan: Plan  # its baseline resolved for E
    batches: Batches
    evidence: funcprobe.Evidence | None  # None: the rule reads no optimizer state
    passes: funcprobe.Passes
    prediction: funcprobe.Prediction
    unit_N: torch.Tensor  # sampling unit of every sequence of E


def predicted(plan: Plan, stages: Stages, narrator: Narrator) -> Predicted:
    """Sample, verify the optimizer's state by the gradient of U, predict.

    InputError as `batches.sample`, `verify_state` and `funcprobe.predict` raise it.
    """
    batches = with_loss(plan, sample(plan, stages, narrator), stages, narrator)
    own = batches.sampler_logp_NR is None
    entropy = baselines.resolve(plan.entropy, batches.eval_batch, own_samples=own)
    plan = plan._replace(entropy=entropy)
    Y = gradients_on_U(plan, batches, stages, narrator)
    evidence = verify_state(plan, tree.mean(Y), narrator)
    unit_N = _units(plan, batches)
    with narrator.phase("first order", _sequences(batches)) as stage:
        passes = _passes(plan, batches, Y, unit_N, stages, stage)
        prediction = funcprobe.summarise(
            plan.policy.params,
            passes,
            batches.eval_batch,
            batches.update,
            plan.adam_state,
            entropy=plan.entropy,
            step=plan.step,
            sampler_logp_NR=batches.sampler_logp_NR,
            unit_N=unit_N,
        )
    return Predicted(plan, batches, evidence, passes, prediction, unit_N)


def _sequences(batches: Batches) -> int:
    """Sequences in the passes of first order: along v and X on E, along P X on U if Y is not 0."""
    over_U = len(batches.update.batch.prompt_N) if batches.update.moves else 0
    return 2 * len(batches.eval_batch.prompt_N) + over_U


def _units(plan: Plan, batches: Batches) -> torch.Tensor:
    """Sampling units of E: its draws, independent where it was sampled here; else its prompts.

    Drawn with replacement, two responses to one prompt are as independent as any two; prompts as units
    would count the variance between prompts twice if few prompts are drawn often.
    """
    prompt_N = batches.eval_batch.prompt_N
    return torch.arange(len(prompt_N)) if plan.supplied_eval is None else prompt_N


def _blocks(plan: Plan, unit_N: torch.Tensor) -> torch.Tensor | None:
    """Random blocks of E, for the errors of shares; None without attribution."""
    if plan.config.attribution.level == "off":
        return None
    seed = derived_seed(plan.config.run.seed, "blocks")
    return random_blocks(unit_N, torch.Generator().manual_seed(seed))


def _passes(
    plan: Plan,
    batches: Batches,
    Y: tuple[Params, ...],
    unit_N: torch.Tensor,
    stages: Stages,
    stage: Stage,
) -> funcprobe.Passes:
    params = plan.policy.params
    block_N = _blocks(plan, unit_N)
    blocks = None
    if block_N is not None:
        dots = like(int(block_N.max()) + 1, len(params), len(StepParts._fields))
        blocks = Blocks(like(len(block_N), dtype=torch.int64), dots)
    X, of_E, of_U = (
        like_gradient(params),
        like_stats(batches.eval_batch),
        like_stats(batches.update.batch),
    )
    baseline = None if plan.entropy.baseline == "none" else like_tokens(batches.eval_batch)
    shapes = funcprobe.Passes((X,) * len(Y), of_E, of_E, X, baseline, of_U, of_U, of_U, blocks)
    inputs = {**step_inputs(plan, batches), "passes": funcprobe.Passes._fields, "blocks": block_N}

    def compute(stage: Stage) -> funcprobe.Passes:
        return funcprobe.first_order_passes(
            params,
            batches.eval_batch,
            batches.update,
            plan.adam_state,
            counted(plan.forward, stage, "E"),
            entropy=plan.entropy,
            step=plan.step,
            max_tokens=plan.max_tokens,
            sampler_logp_NR=batches.sampler_logp_NR,
            update_forward=counted(as_trained(plan.forward, plan.policy.padding), stage, "U"),
            Y=Y,
            block_N=block_N,
        )

    found = computed(stages, "first-order", inputs, shapes, compute, stage)
    if block_N is None or found.blocks is None:
        return found
    return found._replace(blocks=found.blocks._replace(block_N=block_N))


def step_inputs(plan: Plan, batches: Batches) -> dict[str, Any]:
    """The inputs of what depends on E, U and the step, for the keys of stages."""
    return {
        **state_inputs(plan, batches),
        "coef": [batches.update.coef_NR, batches.update.entropy_coef_NR],
        "update": batches.update.batch,
        "optimizer": [plan.adam_state.exp_avg, plan.adam_state.exp_avg_sq, plan.adam_state.step],
        "groups": plan.adam_state.groups,
        "step": plan.step,
        "masks": [len(plan.masks), plan.config.run.seed] if plan.masks else 0,
        "entropy": plan.entropy,
    }
