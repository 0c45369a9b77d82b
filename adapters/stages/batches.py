"""E and U: sampled from the policy, read from an earlier run's stage, or supplied; with rewards."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from funcprobe.losses.loss import LossInputs, LossReport
from funcprobe.step.objective import update_batch
from funcprobe.types import Batch, InputError, UpdateBatch

from .. import rollouts
from ..checkpoint.model import Policy
from ..config.schema import SamplingConfig
from ..console import Narrator
from ..resume import resumable
from ..rollouts import Rollouts
from ..sampling.advantages import (
    groups_of_zero,
    require_prompts,
    require_step,
    update_advantages,
    zero_means,
)
from ..sampling.drawing import derived_seed, eval_index, update_index
from ..sampling.generate import sample_responses
from ..sampling.prompts import Prompt
from ..sampling.responses import Responses
from ..sampling.rewards import Reward, Text
from ..sampling.shared_out import shared_out
from ..store import Stages
from .plan import Plan, vocabulary
from .prompts import response_line


class Batches(NamedTuple):
    """E and U as stored and as the core's types."""

    eval_rollouts: Rollouts
    update_rollouts: Rollouts
    eval_batch: Batch
    update: UpdateBatch
    sampler_logp_NR: torch.Tensor | None
    equal_groups: int
    loss: LossReport | None = None  # of the chosen loss at theta
    loss_inputs: LossInputs | None = None  # that it was given; None: J of the preset
    reference: str | None = None  # the reference policy of that loss; None: it has none


def sample(plan: Plan, stages: Stages, narrator: Narrator) -> Batches:
    """Both batches. InputError for rewards that cannot be used, and for fewer than two prompts.

    Supplied batches have passed the same checks when the plan was loaded.
    """
    eval_rollouts = plan.supplied_eval or _eval(plan, stages, narrator)
    update_rollouts = plan.supplied_update or _update(plan, stages, narrator)
    require_prompts("E", eval_rollouts.prompt_index)
    require_prompts("U", update_rollouts.prompt_index)
    mode = plan.objective.advantage
    advantage_N, lines = update_advantages(update_rollouts, mode)
    prompt_index = update_rollouts.prompt_index
    if plan.loss is None:  # else a KL term or an entropy bonus may have a gradient
        without = require_step(advantage_N, prompt_index, mode, plan.step.rule)
        if plan.supplied_update is None:  # else said when it was read
            lines += without
    equal = groups_of_zero(advantage_N, torch.tensor(prompt_index))
    eval_batch = rollouts.to_batch(eval_rollouts)
    update = update_batch(
        rollouts.to_batch(update_rollouts),
        advantage_N,
        plan.objective.normalisation,
        plan.objective.constant,
    )
    size_M = update.batch.prompt_N.unique(return_counts=True)[1]
    if len(size_M.unique()) > 1 and plan.loss is None:
        lines.append(
            f"warning: U has {int(size_M.min())} to {int(size_M.max())} responses per prompt, but "
            "trainers write groups of equal size: check that the file is complete"
        )
    generated = len(set(update_rollouts.generated_tokens or ()))
    if generated > 1 and plan.loss is None and plan.objective.normalisation == "token_mean":
        lines.append(
            f"warning: U is of {generated} generations, by whose tokens TRL divides each, but "
            'normalisation "token_mean" by those of all: set objective.loss = "trl"'
        )
    drawn = [("E", eval_rollouts)] if plan.supplied_eval is None else []
    drawn += [("U", update_rollouts)] if plan.supplied_update is None and not drawn else []
    lines += [response_line(plan.policy, name, of_batch) for name, of_batch in drawn]
    for line in lines:
        narrator.say(line)
    known = [r for r in update_rollouts.reward or [] if not math.isnan(r)]
    mean = f"mean reward {sum(known) / len(known):.3f}, " if known else ""
    narrator.say(
        f"E: {len(eval_batch.prompt_N)} responses to {len(eval_batch.prompt_N.unique())} prompts; "
        f"U: {len(advantage_N)} responses to {len(size_M)} prompts, {mean}"
        f"{equal} of {len(size_M)} groups have {zero_means(mode)}"
        f"{'; these add no gradient' if plan.loss is None else ''}"
    )
    return Batches(
        eval_rollouts=eval_rollouts,
        update_rollouts=update_rollouts._replace(advantage=advantage_N.tolist()),
        eval_batch=eval_batch,
        update=update,
        sampler_logp_NR=rollouts.sampler_logp(eval_rollouts, eval_batch),
        equal_groups=equal,
    )


def _eval(plan: Plan, stages: Stages, narrator: Narrator) -> Rollouts:
    seed = derived_seed(plan.config.run.seed, "E")
    index = plan.world.on_first(lambda: eval_index(plan.config, len(plan.prompts)))
    return _sampled(plan, "E", index, seed, stages, narrator)


def _update(plan: Plan, stages: Stages, narrator: Narrator) -> Rollouts:
    seed, sampling = derived_seed(plan.config.run.seed, "U"), plan.config.sampling
    distinct = plan.world.on_first(lambda: update_index(plan.config, len(plan.prompts)))
    index = [i for i in distinct for _ in range(sampling.G)]
    drawn = _sampled(plan, "U", index, seed, stages, narrator)
    assert plan.reward is not None  # loaded unless U is supplied
    with narrator.phase("rewards of U"):
        reward_N = rewards_of_drawn(plan, plan.reward, drawn)
    return drawn._replace(reward=reward_N.tolist())


def rewards_of_drawn(plan: Plan, reward: Reward, drawn: Rollouts) -> Float64[Tensor, " N"]:
    """Of responses to the plan's prompts, with the prompts' rows. InputError as `reward` raises it.

    By the first of several processes alone, as the user's code may depend on anything.
    """
    rows = [plan.prompts[i].row for i in drawn.prompt_index]
    conversational = plan.config.reward.conversational
    prompts = [_for_reward(plan.prompts[i], conversational) for i in drawn.prompt_index]
    return plan.world.on_first(lambda: reward(prompts, drawn.response, drawn.response_ids, rows))


def _for_reward(prompt: Prompt, conversational: bool | None) -> Text:
    """As TRL passes it, messages or text as in the data set, unless reward.conversational is set."""
    if conversational is None:
        conversational = not isinstance(prompt.given, str)
    if conversational and prompt.messages is not None:
        return prompt.messages
    return prompt.given if isinstance(prompt.given, str) else prompt.text


def _sampled(
    plan: Plan, name: str, index: list[int], seed: int, stages: Stages, narrator: Narrator
) -> Rollouts:
    policy = plan.policy

    def generate(path: Path) -> None:
        ids = [plan.prompt_ids[i] for i in index]
        sampling, server = plan.config.sampling, plan.config.server

        def of_part(part: Sequence[Sequence[int]], own: Sequence[int]) -> Responses:
            return sample_responses(
                policy, part, sampling, seed, here.advance, own, server, here.progress
            )

        found = shared_out(plan.world, ids, of_part)
        if plan.world.first:  # of all processes
            stage.drew(found.tokens, found.padding)
        for line in found.lines:
            narrator.say(line)
        drawn = Rollouts(
            prompt_index=index,
            prompt=[plan.prompts[i].text for i in index],
            response=[policy.tokenizer.decode(y, skip_special_tokens=True) for y in found.ids],
            prompt_ids=ids,
            response_ids=found.ids,
            finish_reason=["stop" if done else "length" for done in found.finished],
            temperature=plan.config.sampling.temperature,
            sampler_logp=found.logp,
        )
        rollouts.save_rollouts(drawn, path)

    def read(path: Path) -> Rollouts:
        found = rollouts.load_rollouts(path, vocabulary(policy), rewards=False)
        sampling = plan.config.sampling
        if (
            list(found.prompt_index) != index
            or [list(ids) for ids in found.prompt_ids] != [list(plan.prompt_ids[i]) for i in index]
            or found.temperature != sampling.temperature
            or (found.sampler_logp is None) != (sampling.engine != "server")
            or max(map(len, found.response_ids)) > sampling.max_new_tokens
        ):
            raise InputError("it has other prompts, or responses that were sampled otherwise")
        return found

    inputs = {
        "policy": plan.inputs["policy"],
        "prompt_ids": [plan.prompt_ids[i] for i in index],
        "sampling": plan.config.sampling.model_dump(exclude={"B_E", "B_U", "G", "generation_batch"}),
        "server": _served(plan),
        "index": index,
        "seed": seed,
    }
    how = parts_of(plan.config.sampling)
    with (
        narrator.phase(f"sample {name}", len(index)) as stage,
        resumable(stages, f"rollouts-{name}", inputs, stage, how) as here,
    ):
        found = stages.file(
            f"rollouts-{name}",
            inputs,
            "parquet",
            generate,
            read,
            stage.found,
        )
    # The text of a stored stage, which rewards read, may be by an earlier tokenizer of the same ids.
    return found._replace(prompt=[plan.prompts[i].text for i in index], response=_texts(found, policy))


def parts_of(sampling: SamplingConfig) -> str:
    """What of responses is kept at once."""
    return "batches" if sampling.engine == "batched" else "responses"


def _served(plan: Plan) -> list[str | None]:
    """What of the server the responses depend on."""
    server = plan.config.server
    return [server.url, server.model] if plan.config.sampling.engine == "server" else []


def _texts(found: Rollouts, policy: Policy) -> list[str]:
    return [policy.tokenizer.decode(y, skip_special_tokens=True) for y in found.response_ids]
