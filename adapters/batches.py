"""E and U: sampled from the policy, taken from an earlier run's stage, or brought; with rewards."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from funcprobe.objective import advantages, coefficients, equal_reward_groups
from funcprobe.types import Batch, InputError, UpdateBatch

from . import rollouts
from .console import Narrator
from .plan import Plan, vocabulary
from .prompts import draw_distinct, draw_with_replacement
from .rollouts import Rollouts
from .sampling import sample_responses
from .store import Stages


class Batches(NamedTuple):
    """E and U as they are stored and as the core takes them."""

    eval_rollouts: Rollouts
    update_rollouts: Rollouts
    eval_batch: Batch
    update: UpdateBatch
    sampler_logp_NR: torch.Tensor | None
    equal_groups: int


def sample(plan: Plan, stages: Stages, narrator: Narrator) -> Batches:
    """Both batches. InputError for rewards that cannot be used, and for fewer than two prompts."""
    eval_rollouts = plan.brought_eval or _eval(plan, stages, narrator)
    update_rollouts = plan.brought_update or _update(plan, stages, narrator)
    eval_batch = rollouts.to_batch(eval_rollouts)
    update_batch = rollouts.to_batch(update_rollouts)
    reward_N = torch.tensor(update_rollouts.reward, dtype=torch.float64)
    for name, batch in (("E", eval_batch), ("U", update_batch)):
        if len(batch.prompt_N.unique()) < 2:
            raise InputError(
                f"{name} has responses to one prompt only, a standard error needs at least two: raise "
                f"sampling.B_{name}, or give more prompts"
            )
    advantage_N = advantages(reward_N, update_batch.prompt_N, plan.objective.advantage)
    equal = equal_reward_groups(reward_N, update_batch.prompt_N)
    groups = len(update_batch.prompt_N.unique())
    if equal == groups:
        raise InputError(
            f"all {groups} groups of U have equal rewards, so every advantage is 0 and v has no "
            "gradient part: take other prompts or rewards, or raise sampling.G"
        )
    coef_NR = coefficients(
        advantage_N,
        update_batch.response_length_N,
        update_batch.prompt_N,
        plan.objective.normalisation,
        plan.objective.constant,
    )
    narrator.say(
        f"E: {len(eval_batch.prompt_N)} responses to {len(eval_batch.prompt_N.unique())} prompts; "
        f"U: {len(reward_N)} responses to {groups} prompts, mean reward {float(reward_N.mean()):.3f}, "
        f"{equal} groups of equal rewards (no gradient from these)"
    )
    return Batches(
        eval_rollouts=eval_rollouts,
        update_rollouts=update_rollouts._replace(advantage=advantage_N.tolist()),
        eval_batch=eval_batch,
        update=UpdateBatch(update_batch, coef_NR),
        sampler_logp_NR=rollouts.sampler_logp(eval_rollouts, eval_batch),
        equal_groups=equal,
    )


def _eval(plan: Plan, stages: Stages, narrator: Narrator) -> Rollouts:
    seed = _seed(plan.config.run.seed, "E")
    index = draw_with_replacement(plan.config.sampling.B_E, len(plan.prompts), seed)
    return _sampled(plan, "E", index, seed, stages, narrator)


def _update(plan: Plan, stages: Stages, narrator: Narrator) -> Rollouts:
    seed, sampling = _seed(plan.config.run.seed, "U"), plan.config.sampling
    distinct = draw_distinct(sampling.B_U, len(plan.prompts), seed)
    index = [i for i in distinct for _ in range(sampling.G)]
    drawn = _sampled(plan, "U", index, seed, stages, narrator)
    assert plan.reward is not None  # loaded unless U is brought
    with narrator.phase("rewards of U"):
        rows = [plan.prompts[i].row for i in drawn.prompt_index]
        reward_N = plan.reward(drawn.prompt, drawn.response, drawn.response_ids, rows)
    return drawn._replace(reward=reward_N.tolist())


def _sampled(
    plan: Plan, name: str, index: list[int], seed: int, stages: Stages, narrator: Narrator
) -> Rollouts:
    policy = plan.policy

    def generate(path: Path) -> None:
        ids = [plan.prompt_ids[i] for i in index]
        with narrator.phase(f"sample {name}", len(ids)) as advance:
            found = sample_responses(policy, ids, plan.config.sampling, seed, advance)
        drawn = Rollouts(
            prompt_index=index,
            prompt=[plan.prompts[i].text for i in index],
            response=[policy.tokenizer.decode(y, skip_special_tokens=True) for y in found.ids],
            prompt_ids=ids,
            response_ids=found.ids,
            finish_reason=["stop" if done else "length" for done in found.finished],
            temperature=plan.config.sampling.temperature,
        )
        rollouts.save_rollouts(drawn, path)

    inputs = {
        "policy": plan.inputs["policy"],
        "prompt_ids": [plan.prompt_ids[i] for i in index],
        "sampling": plan.config.sampling.model_dump(exclude={"B_E", "B_U", "G"}),
        "index": index,
        "seed": seed,
    }
    with stages.file(f"rollouts-{name}", inputs, "parquet", generate) as path:
        try:
            return rollouts.load_rollouts(path, vocabulary(policy), rewards=False)
        except InputError as error:
            raise InputError(f"stored stage is damaged ({error}): delete it, or use --fresh") from error


def _seed(seed: int, purpose: str) -> int:
    """Independent seeds of E and U from one: neighbouring run seeds share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:6])
