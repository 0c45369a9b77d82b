"""Advantages of U's responses, brought or made of rewards, and whether they make a step."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcprobe.step.objective import Advantage, advantages
from funcprobe.types import InputError

from ..rollouts import Rollouts

Mode: TypeAlias = Advantage | Literal["rollouts"]

LARGEST_REWARD = 1e150  # the squares of larger ones, summed, are no doubles


def update_advantages(update: Rollouts, mode: Mode) -> tuple[Float[Tensor, " N"], list[str]]:
    """Advantage of every response of U, and warnings.

    "rollouts" takes those the rollouts bring. Else they are made of the rewards, where a response
    without one (TRL's None, NaN here) is left out of its group and has advantage 0, as in TRL 1.16;
    a group with one response left has 0 throughout. Advantages that the rollouts bring and that
    differ from these by more than 1e-3 of the largest are a warning. InputError for rewards so large
    that their squares overflow, and for a prompt with one response.
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
    if bool((reward_N[scored_N].abs() > LARGEST_REWARD).any()):
        raise InputError(
            f"a reward of U is {float(reward_N[scored_N].abs().max()):.3g} in size, at most "
            f"{LARGEST_REWARD:g} is expected, so that squares in advantages do not overflow: scale "
            "rewards down"
        )
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


def zero_means(mode: Mode) -> str:
    """What a group whose advantages are all 0 has."""
    return "advantage 0" if mode == "rollouts" else "equal rewards"


def require_prompts(
    name: Literal["E", "U"], prompt_index: Sequence[int], *, brought: bool = False
) -> None:
    """InputError for fewer than two prompts, which have no standard error."""
    if len(set(prompt_index)) > 1:
        return
    cure = (
        "bring a file with more prompts"
        if brought
        else f"raise sampling.B_{name}, or give more prompts"
    )
    raise InputError(
        f"{name} has responses to one prompt only, a standard error needs at least two: {cure}"
    )


def require_gradient(
    advantage_N: Float[Tensor, " N"], prompt_index: Sequence[int], mode: Mode, *, brought: bool = False
) -> int:
    """`groups_of_zero`; InputError where it is all of them."""
    equal = groups_of_zero(advantage_N, torch.tensor(prompt_index))
    if equal < len(set(prompt_index)):
        return equal
    cure = (
        "bring rollouts with others"
        if brought
        else "take other prompts or rewards, or raise sampling.G"
    )
    raise InputError(
        f"all {equal} groups of U have {zero_means(mode)}, so every advantage is 0 and v has no "
        f"gradient part: {cure}"
    )
