"""A microbatch as the model's input: one sequence per row, or all of them packed into one row."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..types import Batch
from .blocks import Packing, Segments, packing


class Rows(NamedTuple):
    """One microbatch: rows of tokens, and the indices of every response token in them and in [N, R]."""

    tokens_NL: Int[Tensor, "n l"]
    row_T: Int[Tensor, " T"]  # row in tokens_NL
    position_T: Int[Tensor, " T"]  # position in that row whose hidden state predicts the token
    target_T: Int[Tensor, " T"]  # the token
    sequence_T: Int[Tensor, " T"]  # sequence in the batch
    k_T: Int[Tensor, " T"]  # position in the response
    sequence_NL: Int[
        Tensor, "n l"
    ]  # sequence of a token, as an index into sequence_T.unique(); -1 if shared
    real: int  # tokens that are not padding
    packing: Packing | None = None  # None: one sequence per row, right-padded

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.tokens_NL.numel()

    @property
    def padding(self) -> int:
        """Number of `tokens` that are padding."""
        return self.tokens - self.real


def plain_rows(batch: Batch, index_N: Int[Tensor, " n"]) -> Rows:
    """The sequences `index_N`, one per row."""
    prompt_n, count_n = batch.prompt_length_N[index_N], batch.response_length_N[index_N]
    longest = int((prompt_n + count_n).max())
    tokens_NL = batch.tokens_NL[index_N, :longest]
    row_T, k_T = _response_tokens(count_n)
    token_T = prompt_n[row_T] + k_T
    return Rows(
        # The last token of the longest row is predicted, never an input.
        tokens_NL=tokens_NL[:, :-1],
        row_T=row_T,
        position_T=token_T - 1,
        target_T=tokens_NL[row_T, token_T],
        sequence_T=index_N[row_T],
        k_T=k_T,
        sequence_NL=index_N.argsort().argsort()[:, None].expand(-1, longest - 1),
        real=int((prompt_n + count_n - 1).sum()),
    )


def packed_rows(
    batch: Batch, index_N: Int[Tensor, " n"], first_N: Int[Tensor, " N"] | None = None
) -> Rows:
    """The sequences `index_N` in one row without padding.

    `first_N` gives the first sequence of the batch with the same prompt as each. With it, a prompt that
    several of the sequences share is in the row once, and the responses to it attend to that copy.
    """
    prompt_n, count_n = batch.prompt_length_N[index_N], batch.response_length_N[index_N]
    # Segments of the row: whole sequences, shared prompts, and the responses to these. None includes a
    # response's last token, which is predicted, never an input.
    shared_n, owner_n = _shared(index_N, first_N)
    owners = shared_n & (owner_n == torch.arange(len(index_N)))
    whole, prompts = (~shared_n).nonzero().flatten(), owners.nonzero().flatten()
    tails = (shared_n & (count_n > 1)).nonzero().flatten()
    causal = torch.cat([whole, prompts])
    causal_length = torch.cat([prompt_n[whole] + count_n[whole] - 1, prompt_n[prompts]])
    causal, causal_length = _longest_first(causal, causal_length)
    tails, tail_length = _longest_first(tails, count_n[tails] - 1)
    segment, length = torch.cat([causal, tails]), torch.cat([causal_length, tail_length])
    begin = torch.cat([torch.zeros_like(causal), prompt_n[tails]])  # in its sequence
    start = length.cumsum(0) - length  # in the row

    of_S = torch.arange(len(length)).repeat_interleave(length)
    offset_S = torch.arange(len(of_S)) - start[of_S]
    position_S = begin[of_S] + offset_S
    # Start of a sequence's prompt, and of its response, in the row.
    prompt_at_n = torch.zeros_like(index_N).index_put((causal,), start[: len(causal)])[owner_n]
    tail_at_n = torch.zeros_like(index_N).index_put((tails,), start[len(causal) :])
    tail_at_n = torch.where(shared_n, tail_at_n, prompt_at_n + prompt_n)
    row_T, k_T = _response_tokens(count_n)
    last_T = prompt_at_n[row_T] + prompt_n[row_T] - 1
    rank_n = index_N.argsort().argsort()
    return Rows(
        tokens_NL=batch.tokens_NL[index_N[segment[of_S]], position_S][None],
        row_T=torch.zeros_like(row_T),
        position_T=torch.where(k_T == 0, last_T, tail_at_n[row_T] + k_T - 1),
        target_T=batch.tokens_NL[index_N[row_T], prompt_n[row_T] + k_T],
        sequence_T=index_N[row_T],
        k_T=k_T,
        sequence_NL=torch.where((shared_n[segment] & (begin == 0))[of_S], -1, rank_n[segment[of_S]])[
            None
        ],
        real=len(of_S),
        packing=packing(
            position_S,
            Segments(start, length, len(causal), prompt_at_n[tails], prompt_n[tails]),
            of_S,
            offset_S,
        ),
    )


def _shared(index_N: Tensor, first_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """(whether a sequence shares its prompt with another of `index_N`, the first of these)."""
    place = torch.arange(len(index_N))
    if first_N is None:
        return torch.zeros(len(index_N), dtype=torch.bool), place
    _, group_n, size = first_N[index_N].unique(return_inverse=True, return_counts=True)
    owner = torch.full_like(size, len(index_N)).scatter_reduce(0, group_n, place, "amin")
    shared_n = size[group_n] > 1
    return shared_n, torch.where(shared_n, owner[group_n], place)


def _longest_first(segment: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    order = length.argsort(descending=True, stable=True)
    return segment[order], length[order]


def _response_tokens(count_n: Tensor) -> tuple[Tensor, Tensor]:
    """(sequence, position in the response) of every response token."""
    k_R = torch.arange(int(count_n.max()))
    row_T, k_T = (k_R < count_n[:, None]).nonzero(as_tuple=True)
    return row_T, k_T
