"""Rules that leave tokens out of J or weight them, c and d alike; its divisors stay as they are."""

import torch
from torch import Tensor

from ..types import InputError, ResponseMask, UpdateBatch
from .expressions import evaluate
from .grammar import Expression
from .rule import Rule, RuleInputs, required, reweighted


def drop_prompt(prompt: int) -> Rule:
    """J without the responses to a prompt, by its index in `Batch.prompt_N`.

    With P fixed, the prediction changes by the prompt's share. InputError for a prompt not in U.
    """

    def rule(inputs: RuleInputs) -> UpdateBatch:
        prompt_N = inputs.update.batch.prompt_N
        if not bool((prompt_N == prompt).any()):
            known = prompt_N.unique().tolist()
            raise InputError(
                f"drop_prompt: U has no prompt {prompt}, expected one of its {len(known)}, of indices "
                f"{known[0]} to {known[-1]}"
            )
        return reweighted(inputs.update, (prompt_N != prompt)[:, None], bonus=True)

    return rule


def drop_tokens(amount: float) -> Rule:
    """J without the tokens whose shares lower the predicted entropy most.

    `amount` below 1 is a share of the tokens in the mask, rounded to the nearest number, at least one;
    from 1 a number of tokens. Fewer are dropped where fewer lower the entropy.
    """

    _require_amount(amount)

    def rule(inputs: RuleInputs) -> UpdateBatch:
        share_NR = required(inputs, "share_NR", "drop_tokens")
        number = tokens_of(amount, inputs.mask_NR)
        lowers_NR = inputs.mask_NR & (share_NR < 0)
        order = torch.argsort(share_NR[lowers_NR], stable=True)[:number]
        return reweighted(inputs.update, ~_at(lowers_NR, order), bonus=True)

    return rule


def random_tokens(amount: float, seed: float) -> Rule:
    """J without `amount` tokens of the mask, counted as in `drop_tokens`, drawn at random: its control.

    `drop_tokens` drops fewer where fewer lower the entropy: compare the tokens touched.
    """
    _require_amount(amount)

    def rule(inputs: RuleInputs) -> UpdateBatch:
        generator = torch.Generator().manual_seed(int(seed))
        drawn = torch.randperm(int(inputs.mask_NR.sum()), generator=generator)
        number = tokens_of(amount, inputs.mask_NR)
        return reweighted(inputs.update, ~_at(inputs.mask_NR, drawn[:number]), bonus=True)

    return rule


def weighted(weight: Expression) -> Rule:
    """J with every token's c and d times the value of an expression: 1 or 0 of a condition."""
    return lambda inputs: reweighted(inputs.update, evaluate(weight, inputs), bonus=True)


def tokens_of(amount: float, mask_NR: ResponseMask) -> int:
    """How many tokens `amount` is: a number from 1 on, else that share of the mask, at least one."""
    count = int(mask_NR.sum())
    return min(int(amount) if amount >= 1 else max(1, round(amount * count)), count)


def _require_amount(amount: float) -> None:
    if amount > 1 and amount != int(amount):
        raise InputError(
            f"the amount of tokens is {amount:g}, expected a share below 1 or a whole number of tokens"
        )


def _at(among_NR: ResponseMask, index: Tensor) -> ResponseMask:
    """True at the `index`-th tokens of those in `among_NR`."""
    at = among_NR.flatten().nonzero()[:, 0][index]
    flat = torch.zeros(among_NR.numel(), dtype=torch.bool).index_fill(0, at, True)
    return flat.reshape(among_NR.shape)
