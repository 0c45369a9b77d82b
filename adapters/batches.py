"""E and U: sampled from the policy, taken from an earlier run's stage, or brought; with rewards."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcprobe.objective import Advantage, advantages, coefficients
from funcprobe.types import Batch, InputError, UpdateBatch

from . import rollouts
from .config import PromptsConfig
from .console import Narrator
from .plan import Plan, vocabulary
from .prompts import draw_distinct, draw_with_replacement, load_prompts
from .rewards import Text
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
    for name, batch in (("E", eval_batch), ("U", update_batch)):
        if len(batch.prompt_N.unique()) < 2:
            raise InputError(
                f"{name} has responses to one prompt only, a standard error needs at least two: raise "
                f"sampling.B_{name}, or give more prompts"
            )
    advantage_N, lines = update_advantages(update_rollouts, plan.objective.advantage)
    size_M = update_batch.prompt_N.unique(return_counts=True)[1]
    equal, groups = groups_of_zero(advantage_N, update_batch.prompt_N), len(size_M)
    of = "advantage 0" if plan.objective.advantage == "rollouts" else "equal rewards"
    if equal == groups:
        raise InputError(
            f"all {groups} groups of U have {of}, so every advantage is 0 and v has no "
            "gradient part: take other prompts or rewards, or raise sampling.G"
        )
    coef_NR = coefficients(
        advantage_N,
        update_batch.response_length_N,
        update_batch.prompt_N,
        plan.objective.normalisation,
        plan.objective.constant,
    )
    if len(size_M.unique()) > 1:
        lines.append(
            f"warning: U has {int(size_M.min())} to {int(size_M.max())} responses per prompt, where "
            "trainers write groups of one size: is the file whole?"
        )
    for line in lines:
        narrator.say(line)
    known = [r for r in update_rollouts.reward or [] if not math.isnan(r)]
    mean = f"mean reward {sum(known) / len(known):.3f}, " if known else ""
    narrator.say(
        f"E: {len(eval_batch.prompt_N)} responses to {len(eval_batch.prompt_N.unique())} prompts; "
        f"U: {len(advantage_N)} responses to {groups} prompts, {mean}"
        f"{equal} groups of {of} (no gradient from these)"
    )
    return Batches(
        eval_rollouts=eval_rollouts,
        update_rollouts=update_rollouts._replace(advantage=advantage_N.tolist()),
        eval_batch=eval_batch,
        update=UpdateBatch(update_batch, coef_NR),
        sampler_logp_NR=rollouts.sampler_logp(eval_rollouts, eval_batch),
        equal_groups=equal,
    )


def update_advantages(
    update: Rollouts, mode: Advantage | Literal["rollouts"]
) -> tuple[Float[Tensor, " N"], list[str]]:
    """Advantage of every response of U, and warnings.

    "rollouts" takes those the rollouts bring. Else they are made of the rewards, where a response
    without one (TRL's None, NaN here) is left out of its group and has advantage 0, as in TRL 1.16;
    a group with one response left has 0 throughout. Advantages that the rollouts bring and that
    differ from these by more than 1e-3 of the largest are a warning.
    """
    brought_N = (
        None if update.advantage is None else torch.tensor(update.advantage, dtype=torch.float64)
    )
    if mode == "rollouts":
        assert brought_N is not None  # needed where rollouts are read
        return brought_N, []
    reward_N = torch.tensor(update.reward, dtype=torch.float64)
    prompt_N = torch.tensor(update.prompt_index)
    scored_N = ~reward_N.isnan()
    _, group_N, size_M = prompt_N.unique(return_inverse=True, return_counts=True)
    alone_M = (torch.bincount(group_N[scored_N], minlength=len(size_M)) < 2) & (size_M > 1)
    made_N = torch.zeros_like(reward_N)
    if bool((used_N := scored_N & ~alone_M[group_N]).any()):
        made_N[used_N] = advantages(reward_N[used_N], prompt_N[used_N], mode)
    lines = []
    if missing := int((~scored_N).sum()):
        lines.append(
            f"warning: {missing} of U's {len(reward_N)} responses have no reward (None): advantage 0, "
            "and left out of their groups' means, as in TRL"
        )
    if brought_N is not None:
        largest, off = float(brought_N.abs().max()), float((brought_N - made_N).abs().max())
        if off > 1e-3 * largest:
            lines.append(
                f"warning: U's own advantages (up to {largest:.3g}) differ by up to {off:.3g} from "
                f"those made of its rewards ({mode}), which are used; to take its own, set "
                'objective.advantage = "rollouts"'
            )
    return made_N, lines


def groups_of_zero(advantage_N: Float[Tensor, " N"], prompt_N: Int[Tensor, " N"]) -> int:
    """How many prompts have advantage 0 throughout, and so no say in the step."""
    return len(prompt_N.unique()) - len(prompt_N[advantage_N != 0].unique())


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
        prompts: Sequence[Text] = drawn.prompt
        if plan.config.reward.conversational:
            chats = _messages(plan.config.prompts)
            prompts = [chats[i] for i in drawn.prompt_index]
        reward_N = plan.reward(prompts, drawn.response, drawn.response_ids, rows)
    return drawn._replace(reward=reward_N.tolist())


def _messages(config: PromptsConfig) -> list[list[dict[str, str]]]:
    """The messages that the chat template rendered, of every prompt of the source."""
    users = load_prompts(
        config.source, prompt_column=config.prompt_column, split=config.split, template=config.template
    )
    system = [] if config.system_prompt is None else [("system", config.system_prompt)]
    return [
        [{"role": role, "content": text} for role, text in (*system, ("user", user.text))]
        for user in users
    ]


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
