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
from funcprobe.types import Params, TokenStats

from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..rollouts import Rollouts
from ..sampling.drawing import derived_seed
from ..sampling.drawn import are_packed, packed, unpacked
from ..sampling.generate import sample_responses
from ..sampling.responses import Responses
from ..sampling.shared_out import shared_out
from ..sampling.supplied import fresh_length
from ..store import Stages
from .batches import Batches, parts_of
from .like import like, like_stats
from .plan import Plan, vocabulary


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
    stages: Stages,
    narrator: Narrator,
) -> Fresh:
    """One response at theta + eta v to the prompt of every sequence of E; the model is unchanged."""
    prompt_ids = list(batches.eval_rollouts.prompt_ids)
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
    lines = list[str]()

    def sample(stage: Stage) -> list[torch.Tensor]:
        def of_part(part: Sequence[Sequence[int]], own: Sequence[int]) -> Responses:
            def there() -> Responses:
                return sample_responses(
                    plan.policy, part, config, seed, stage.advance, own, progress=stage.progress
                )

            return with_params(plan.policy.model, moved, there)

        drawn = shared_out(plan.world, prompt_ids, of_part)
        if plan.world.first:  # of all processes
            stage.drew(drawn.tokens, drawn.padding)
            if engine == "server":
                narrator.say(f"responses at eta {eta:g} are sampled here: the server has theta alone")
        lines.extend(drawn.lines)
        return [torch.tensor(drawn.finished), *packed(dict(enumerate(drawn.ids)))]

    def fits(found: list[torch.Tensor]) -> bool:
        count, most = len(prompt_ids), config.max_new_tokens
        return len(found[1]) == count and are_packed(found[1:], count, most, vocabulary(plan.policy))

    def measure(stage: Stage) -> TokenStats:
        forward = counted(plan.forward, stage, "fresh")
        return funcprobe.token_stats(moved, batch, forward, plan.max_tokens)

    there = {"policy": plan.inputs["policy"], "direction": direction, "eta": eta}
    how = config.model_dump(exclude={"B_E", "B_U", "G", "generation_batch"})
    asked = {**there, "prompt_ids": prompt_ids, "sampling": how, "seed": seed}
    # Every sequence twice: sampling, then a forward.
    with narrator.phase(f"sample E at eta {eta:g}", 2 * len(prompt_ids)) as stage:
        count = len(prompt_ids)
        shapes = [like(count, dtype=torch.bool), *(like(count, dtype=torch.int64) for _ in range(2))]
        shapes.append(like(0))  # as many tokens as there are
        finished_N, *tokens = computed(
            stages, "rollouts-fresh", asked, shapes, sample, stage, parts_of(config), fits
        )
        for line in lines:
            narrator.say(line)
        ids = list(unpacked(tokens)[0].values())
        batch = collate(prompt_ids, ids, batches.eval_rollouts.prompt_index)
        inputs = {**there, **plan.cut, "temperature": plan.temperature, "batch": batch}
        stats = computed(stages, "fresh", inputs, like_stats(batch), measure, stage)
    here = (at.stats, at.mask_NR, at.entropy, at.log_ratio_NR)
    moved_to = (stats, funcprobe.response_mask(batch), at.entropy)
    influence_N = estimators.entropy_influence(*moved_to) - estimators.entropy_influence(*here)
    return Fresh(
        delta=estimators.entropy_value(*moved_to) - estimators.entropy_value(*here),
        error=delta_error(influence_N, unit_N),
        rollouts=batches.eval_rollouts._replace(
            response=[plan.policy.tokenizer.decode(y, skip_special_tokens=True) for y in ids],
            response_ids=ids,
            finish_reason=["stop" if done else "length" for done in finished_N.tolist()],
            sampler_logp=None,
        ),
    )
