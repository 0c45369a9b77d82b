"""Batch -> microbatches of rows (sorted by length, trimmed), and the statistics back to [N, R]."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .types import Batch, InputError, ResponseMask

MAX_TOKENS = 2048  # padded tokens of a microbatch; the activations of all of them are held at once


class Rows(NamedTuple):
    """One microbatch: rows of tokens, and for every response token where it is and where it goes."""

    tokens_NL: Int[Tensor, "n l"]
    row_T: Int[Tensor, " T"]  # row in tokens_NL
    position_T: Int[Tensor, " T"]  # position whose hidden state predicts the token
    target_T: Int[Tensor, " T"]  # the token
    sequence_T: Int[Tensor, " T"]  # sequence in the batch
    k_T: Int[Tensor, " T"]  # position in the response


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], prompt: Sequence[int]
) -> Batch:
    """Token ids of N prompts and responses -> Batch; `prompt[i]` says which prompt sequence i has.

    Raises InputError on an empty batch, an empty prompt or a response of zero tokens.
    """
    if not len(prompts) == len(responses) == len(prompt):
        raise InputError(
            f"{len(prompts)} prompts, {len(responses)} responses and {len(prompt)} prompt numbers: "
            "one of each per sequence is expected"
        )
    if not prompts:
        raise InputError("the batch has no sequences: at least one is needed")
    for i, (x, y) in enumerate(zip(prompts, responses, strict=True)):
        if not len(x) or not len(y):
            part = "response" if len(x) else "prompt"
            raise InputError(
                f"sequence {i} has a {part} of zero tokens: at least one is needed "
                "(a response counts its end-of-sequence token)"
            )
    rows = [torch.tensor([*x, *y]) for x, y in zip(prompts, responses, strict=True)]
    return Batch(
        tokens_NL=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        prompt_length_N=torch.tensor([len(x) for x in prompts]),
        response_length_N=torch.tensor([len(y) for y in responses]),
        prompt_N=torch.tensor(list(prompt)),
    )


def response_mask(batch: Batch) -> ResponseMask:
    """True at the T_i response positions of every sequence; R = max T_i."""
    k_R = torch.arange(int(batch.response_length_N.max()))
    return k_R < batch.response_length_N[:, None]


def select(batch: Batch, index_N: Int[Tensor, " n"]) -> Batch:
    """The sequences `index_N` of a batch, in that order."""
    return Batch(*(field[index_N] for field in batch))


def microbatches(batch: Batch, max_tokens: int) -> list[Rows]:
    """Microbatches of at most `max_tokens` padded tokens that together hold every sequence once.

    Sequences are sorted by length, so that little is padding. Raises InputError if one sequence
    alone is longer than `max_tokens`.
    """
    length_N = (batch.prompt_length_N + batch.response_length_N).tolist()
    longest = max(length_N)
    if longest > max_tokens:
        raise InputError(
            f"sequence {length_N.index(longest)} has {longest} tokens, a microbatch may hold "
            f"{max_tokens}: raise max_tokens to at least {longest}"
        )
    order = sorted(range(len(length_N)), key=lambda i: (-length_N[i], i))
    parts: list[Rows] = []
    start = 0
    while start < len(order):
        count = max_tokens // length_N[order[start]]
        parts.append(_rows(batch, torch.tensor(order[start : start + count])))
        start += count
    return parts


def gather(values_NR: Float[Tensor, "N R"], rows: Rows) -> Float[Tensor, " T"]:
    """The entries of an [N, R] tensor at a microbatch's response tokens."""
    return values_NR[rows.sequence_T, rows.k_T]


def scatter(
    values: Sequence[Float[Tensor, " T"]], parts: Sequence[Rows], batch: Batch
) -> Float[Tensor, "N R"]:
    """Per-token values of all microbatches -> [N, R] in float64 on the CPU, zero elsewhere."""
    shape = (batch.tokens_NL.shape[0], int(batch.response_length_N.max()))
    index = (torch.cat([r.sequence_T for r in parts]), torch.cat([r.k_T for r in parts]))
    flat = torch.cat([v.to(device="cpu", dtype=torch.float64) for v in values])
    return torch.zeros(shape, dtype=torch.float64).index_put(index, flat)


def _rows(batch: Batch, index_N: Int[Tensor, " n"]) -> Rows:
    part = select(batch, index_N)
    longest = int((part.prompt_length_N + part.response_length_N).max())
    tokens_NL = part.tokens_NL[:, :longest]
    row_T, k_T = response_mask(part).nonzero(as_tuple=True)
    token_T = part.prompt_length_N[row_T] + k_T
    return Rows(
        # The last token of the longest row is predicted, never read.
        tokens_NL=tokens_NL[:, :-1],
        row_T=row_T,
        position_T=token_T - 1,
        target_T=tokens_NL[row_T, token_T],
        sequence_T=index_N[row_T],
        k_T=k_T,
    )
