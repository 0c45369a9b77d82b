"""Sampled responses, whichever engine sampled them."""

from collections.abc import Sequence
from typing import NamedTuple


class Responses(NamedTuple):
    """Token ids of each response, its first end-of-sequence token included; whether it has one."""

    ids: list[list[int]]
    finished: list[bool]
    tokens: int  # that went through the model, of prompts and step by step
    padding: int  # of these: before prompts, and after responses while others continued
    logp: list[list[float]] | None = None  # of each token, by another program that sampled it
    lines: tuple[str, ...] = ()  # of the log


def through_first_eos(response: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """The response up to its first end-of-sequence token; all of it if it has none."""
    for k, token in enumerate(response):
        if token in eos_ids:
            return list(response[: k + 1])
    return list(response)


def tokens_of(prompt_ids: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]) -> int:
    """Tokens that must go through the model: the last of a response is sampled, never an input."""
    return sum(len(x) + len(y) - 1 for x, y in zip(prompt_ids, ids, strict=True))
