"""Advantages of U's responses, supplied or computed from rewards; whether they give a step."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcprobe.step.objective import Advantage, advantages
from funcprobe.types import InputError, Rule

from ..rollouts import Rollouts

Mode: TypeAlias = Advantage | Literal["rollouts"]

LARGEST_REWARD = 1e150  # sums of squares of larger ones overflow a double


def update_advantages(update: Rollouts, mode: Mode) -> tuple[Float[Tensor, " N"], list[str]]:
    """Advantage of every response of U, and warnings.

    "rollouts" uses the supplied ones. Otherwise they are computed from the rewards; a response without
    a reward (TRL's None, NaN here) is excluded from its group and has advantage 0, as in TRL 1.16; a
    group with a single remaining response has 0 throughout. Supplied advantages that differ from the
    computed ones by more than 1e-3 of the largest give a warning. InputError for rewards so large that
    their squares overflow, and for a prompt with one response.
    """
    supplied_N = (
        None if update.advantage is None else torch.tensor(update.advantage, dtype=torch.float64)
    )
    if mode == "rollouts":
        assert supplied_N is not None  # needed where rollouts are read
        return supplied_N, []
    reward_N = torch.tensor(update.reward, dtype=torch.float64)
    prompt_N = torch.tensor(update.prompt_index)
    scored_N = ~reward_N.isnan()
    if bool((reward_N[scored_N].abs() > LARGEST_REWARD).any()):
        raise InputError(
            f"a reward of U has magnitude {float(reward_N[scored_N].abs().max()):.3g}, at most "
            f"{LARGEST_REWARD:g} is expected, so that its square does not overflow: rescale the rewards"
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
            "and excluded from the means of their groups, as in TRL"
        )
    if supplied_N is not None:
        largest, off = float(supplied_N.abs().max()), float((supplied_N - made_N).abs().max())
        if off > 1e-3 * largest:
            lines.append(
                f"warning: supplied advantages of U (up to {largest:.3g}) differ by up to {off:.3g} "
                f"from those computed from its rewards ({mode}), which are used; to use the supplied "
                'ones, set objective.advantage = "rollouts"'
            )
    return made_N, lines


def groups_of_zero(advantage_N: Float[Tensor, " N"], prompt_N: Int[Tensor, " N"]) -> int:
    """Number of prompts whose advantages are all 0, so that they do not enter the step."""
    return len(prompt_N.unique()) - len(prompt_N[advantage_N != 0].unique())


def zero_means(mode: Mode) -> str:
    """What characterises a group whose advantages are all 0."""
    return "advantage 0" if mode == "rollouts" else "equal rewards"


def require_prompts(
    name: Literal["E", "U"], prompt_index: Sequence[int], *, supplied: bool = False
) -> None:
    """InputError for fewer than two prompts, which have no standard error."""
    if len(set(prompt_index)) > 1:
        return
    remedy = (
        "supply a file with more prompts"
        if supplied
        else f"raise sampling.B_{name}, or give more prompts"
    )
    raise InputError(
        f"{name} has responses to one prompt only, a standard error needs at least two: {remedy}"
    )


def require_step(
    advantage_N: Float[Tensor, " N"],
    prompt_index: Sequence[int],
    mode: Mode,
    rule: Rule,
    *,
    supplied: bool = False,
) -> list[str]:
    """A line if no group of U has a gradient: trainers step all the same, by momentum and decay.

    InputError if v is then 0, by a rule without these two.
    """
    equal = groups_of_zero(advantage_N, torch.tensor(prompt_index))
    if equal < len(set(prompt_index)):
        return []
    found = f"all {equal} groups of U have {zero_means(mode)}, so that every advantage is 0"
    if rule == "adamw":
        return [
            f"{found}: Y = 0, and AdamW's step is by momentum and weight decay alone, as in training; "
            "the error over U is 0 for this U, and says nothing of the gradient of another"
        ]
    remedy = (
        "supply other rollouts" if supplied else "use other prompts or rewards, or raise sampling.G"
    )
    raise InputError(
        f'{found}, and so is v by rule "{rule}": {remedy}, or set optimizer.rule = "adamw", whose step '
        "has momentum and weight decay as well"
    )
