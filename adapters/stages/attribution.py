"""Who makes the predicted change: the tangents of U for marginals, and the shares, by arithmetic."""

import funcprobe
from funcprobe.types import TokenStats

from ..checkpoint.padding import as_trained
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..store import Stages
from .first_order import Predicted, step_inputs
from .like import like_stats


def attributed(found: Predicted, stages: Stages, narrator: Narrator) -> funcprobe.Attribution | None:
    """`funcprobe.attribute` of a prediction, by one more pass over U; None if it is off."""
    plan, batches, passes = found.plan, found.batches, found.passes
    if plan.config.attribution.level == "off":
        return None
    update = batches.update
    sequences = len(update.batch.prompt_N) if update.moves else 0
    with narrator.phase("attribution", sequences) as stage:
        return funcprobe.attribute(
            plan.policy.params,
            passes,
            marginals(found, stages, stage),
            batches.eval_batch,
            update,
            plan.adam_state,
            step=plan.step,
            entropy=plan.entropy,
            sampler_logp_NR=batches.sampler_logp_NR,
            unit_N=found.unit_N,
        )


def marginals(found: Predicted, stages: Stages, stage: Stage) -> TokenStats:
    """`funcprobe.marginal_tangents` of a prediction: one pass over U, or stored."""
    plan, batches, passes = found.plan, found.batches, found.passes

    def compute(stage: Stage) -> TokenStats:
        return funcprobe.marginal_tangents(
            plan.policy.params,
            passes,
            batches.update,
            plan.adam_state,
            counted(as_trained(plan.forward, plan.policy.padding), stage, "U"),
            step=plan.step,
            max_tokens=plan.max_tokens,
        )

    inputs = {**step_inputs(plan, batches), "X": passes.X}
    return computed(stages, "marginals", inputs, like_stats(batches.update.batch), compute, stage)
