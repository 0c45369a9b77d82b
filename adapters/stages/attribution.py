"""Who makes the predicted change: the tangents of U for marginals, and the shares, by arithmetic."""

from typing import Any

import funcprobe
from funcprobe.types import TokenStats

from ..checkpoint.padding import as_trained
from ..console import Narrator
from ..machine.cost import counted
from ..store import Stages
from .first_order import Predicted, step_inputs
from .sweep import STATS


def attributed(found: Predicted, stages: Stages, narrator: Narrator) -> funcprobe.Attribution | None:
    """`funcprobe.attribute` of a prediction, by one more pass over U; None if it is off."""
    plan, batches, passes = found.plan, found.batches, found.passes
    if plan.config.attribution.level == "off":
        return None
    params, update = plan.policy.params, batches.update
    given: dict[str, Any] = {"adam_state": plan.adam_state, "step": plan.step}
    inputs = {**step_inputs(plan, batches), "X": passes.X}
    sequences = len(update.batch.prompt_N) if update.moves else 0
    with narrator.phase("attribution", sequences) as stage:

        def compute() -> TokenStats:
            forward = counted(as_trained(plan.forward, plan.policy.padding), stage, "U")
            return funcprobe.marginal_tangents(
                params, passes, update, forward=forward, max_tokens=plan.max_tokens, **given
            )

        along_DX: TokenStats = stages.tensors("marginals", inputs, STATS, compute, stage.found)
        return funcprobe.attribute(
            params,
            passes,
            along_DX,
            batches.eval_batch,
            update,
            entropy=plan.entropy,
            sampler_logp_NR=batches.sampler_logp_NR,
            unit_N=found.unit_N,
            **given,
        )
