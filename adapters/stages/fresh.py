"""The direct estimate from responses resampled at theta + eta v, where importance weights fail."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

import funcprobe
from funcprobe import tree
from funcprobe.policy.forward import with_params
from funcprobe.policy.layout import collate
from funcprobe.statistics import estimators
from funcprobe.statistics.evaluation import Evaluation
from funcprobe.statistics.intervals import Error, delta_error
from funcprobe.types import Params

from ..console import Narrator
from ..machine.cost import counted
from ..rollouts import Rollouts
from ..sampling.drawing import derived_seed
from ..sampling.generate import sample_responses
from ..sampling.responses import Responses
from ..sampling.shared_out import shared_out
from ..sampling.supplied import fresh_length
from .batches import Batches
from .plan import Plan


class Fresh(NamedTuple):
    """H(theta + eta v) from responses sampled there, minus H(theta) from E, on the same prompts."""

    delta: float
    error: Error  # over the sampling units of E, each with both of its responses
    rollouts: Rollouts


def sample_again(
    plan: Plan,
    batches: Batches,
    at: Evaluation,
    direction: Params,
    eta: float,
    unit_N: torch.Tensor,
    narrator: Narrator,
) -> Fresh:
    """One response at theta + eta v to the prompt of every sequence of E; the model is unchanged.

    Resampled in every run, as no stage stores them.
    """
    prompt_ids = batches.eval_rollouts.prompt_ids
    moved = tree.axpy(eta, direction, plan.policy.params)
    engine = plan.config.sampling.engine
    config = plan.config.sampling.model_copy(
        update={
            "engine": "batched" if engine == "server" else engine,  # a server has theta alone
            "temperature": plan.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "max_new_tokens": fresh_length(plan.config, plan.supplied_eval),
        }
    )
    seed = derived_seed(plan.config.run.seed, f"E at eta {eta!r}")
    # Every sequence twice: sampling, then a forward.
    with narrator.phase(f"sample E at eta {eta:g}", 2 * len(prompt_ids)) as stage:

        def sample(part: Sequence[Sequence[int]], own: Sequence[int]) -> Responses:
            def of_part() -> Responses:
                return sample_responses(plan.policy, part, config, seed, stage.advance, own)

            return with_params(plan.policy.model, moved, of_part)

        drawn = shared_out(plan.world, prompt_ids, sample)
        if plan.world.first:  # of all processes
            stage.drew(drawn.tokens, drawn.padding)
            if engine == "server":
                narrator.say(f"responses at eta {eta:g} are sampled here: the server has theta alone")
        for line in drawn.lines:
            narrator.say(line)
        batch = collate(prompt_ids, drawn.ids, batches.eval_rollouts.prompt_index)
        forward = counted(plan.forward, stage, "fresh")
        stats = funcprobe.token_stats(moved, batch, forward, plan.max_tokens)
    here = (at.stats, at.mask_NR, at.entropy, at.log_ratio_NR)
    there = (stats, funcprobe.response_mask(batch), at.entropy)
    influence_N = estimators.entropy_influence(*there) - estimators.entropy_influence(*here)
    return Fresh(
        delta=estimators.entropy_value(*there) - estimators.entropy_value(*here),
        error=delta_error(influence_N, unit_N),
        rollouts=batches.eval_rollouts._replace(
            response=[plan.policy.tokenizer.decode(y, skip_special_tokens=True) for y in drawn.ids],
            response_ids=drawn.ids,
            finish_reason=["stop" if done else "length" for done in drawn.finished],
            sampler_logp=None,
        ),
    )
