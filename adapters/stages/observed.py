"""Functions of E's responses that a run observes beside the entropy, rewards among them."""

import torch
from jaxtyping import Float64
from torch import Tensor

from funcprobe.types import InputError

from ..console import Narrator
from ..machine.home import expanded
from ..rollouts import SCHEMA, Rollouts
from ..rollouts.files import read_columns
from ..sampling.rewards import Reward
from .batches import Batches, rewards_of_drawn
from .plan import Plan, configured_reward


def rewards_of_E(plan: Plan, batches: Batches, narrator: Narrator) -> Float64[Tensor, " N"]:
    """The reward of every response of E; NaN where it does not apply (TRL's None).

    E's own column reward, where it has one. Else by reward.function: of a sampled E as the rewards of a
    sampled U, with the rows of prompts.source; of a supplied E on its text, with the file's columns
    beside SCHEMA as rows. Nothing is stored, as the function may depend on anything.

    InputError, one line, where a supplied E has neither rewards nor what the function needs; where no
    response has a reward; for an infinite one; and as the reward raises it.
    """
    found = batches.eval_rollouts
    if found.reward is None:
        reward = plan.reward or configured_reward(plan.config)
        add = (
            f"add a column reward to {plan.config.rollouts.eval}, null where the reward does not apply"
        )
        what = f"reward.function = {plan.config.reward.function!r}"
        with narrator.phase("rewards of E"):
            return values_on_E(plan, found, reward, f"E is supplied without rewards, and {what}", add)
    reward_N = torch.tensor(found.reward, dtype=torch.float64)
    if bool(reward_N.isinf().any()):
        row = int(reward_N.isinf().nonzero()[0])
        raise InputError(
            f"response {row} of E has reward {float(reward_N[row])}, a finite number is expected: "
            "correct it, or leave it out where the reward does not apply"
        )
    if bool(reward_N.isnan().all()):
        raise InputError("no response of E has a reward: fill in the column reward, or remove it")
    return reward_N


def values_on_E(
    plan: Plan, found: Rollouts, function: Reward, what: str, remedy: str
) -> Float64[Tensor, " N"]:
    """The function on E's responses; NaN where it does not apply.

    Of a supplied E with the file's own columns as rows; InputError if these do not suffice, which
    begins with `what` and ends with the `remedy`.
    """
    if plan.supplied_eval is None:
        return rewards_of_drawn(plan, function, found)
    if plan.config.reward.conversational:
        raise InputError(f"{what} needs messages (reward.conversational = true): {remedy}")
    path = expanded(str(plan.config.rollouts.eval))
    found_beside = read_columns(path, "others").values
    columns = {k: v for k, v in found_beside.items() if k not in SCHEMA.names}
    rows = [{k: v[i] for k, v in columns.items()} for i in range(len(found.response_ids))]
    decode = plan.policy.tokenizer.decode
    responses = [decode(y, skip_special_tokens=True) for y in found.response_ids]
    prompts = [
        text or decode(x, skip_special_tokens=True)
        for text, x in zip(found.prompt, found.prompt_ids, strict=True)
    ]
    try:
        return plan.world.on_first(lambda: function(prompts, responses, found.response_ids, rows))
    except InputError as error:
        raise InputError(
            f"{what} does not apply to its columns ({error}): {remedy}, or the columns that the "
            "function reads"
        ) from error
