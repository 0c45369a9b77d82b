"""A batch as microbatches of rows, and the statistics of these as [N, R]."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..types import Batch, InputError, ResponseMask
from .rows import Rows, packed_rows, plain_rows

MAX_TOKENS = 2048  # tokens of a microbatch, padding included; their activations are held at once
# Share of the plainer layout's tokens below which a layout is used: its attention costs a few per cent.
PACKING, SHARING = 0.95, 0.9

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

Layout: TypeAlias = Literal["plain", "packed", "shared"]
"""plain: one sequence per row, padded; packed: one row, no padding; shared: also each prompt once."""


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], prompt: Sequence[int]
) -> Batch:
    """Token ids of N prompts and responses -> Batch; `prompt[i]` is the prompt index of sequence i.

    Raises InputError for an empty batch, an empty prompt or a response of zero tokens.
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
                "(a response includes its end-of-sequence token)"
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
    _require_on_cpu(batch)
    k_R = torch.arange(int(batch.response_length_N.max()))
    return k_R < batch.response_length_N[:, None]


def select(batch: Batch, index_N: Int[Tensor, " n"]) -> Batch:
    """The sequences `index_N` of a batch, in that order."""
    return Batch(*(field[index_N] for field in batch))


def microbatches(batch: Batch, max_tokens: int, layout: Layout = "plain") -> list[Rows]:
    """Microbatches of at most `max_tokens` tokens that together hold every response token once.

    `layout` is the most compact one allowed: of it and the plainer ones, the one with the fewest tokens
    is used, provided that it saves 5 % (shared prompts: 10 %). Sequences are sorted by length, to limit
    padding. Raises InputError if a single sequence is longer than `max_tokens`, and for a batch that is
    not on the CPU.
    """
    found = grouped(batch, max_tokens, layout)
    return [found.build(batch, part) for part in found.parts]


class Groups(NamedTuple):
    """Microbatches before they are built: the sequences and the number of tokens of each."""

    parts: list[Int[Tensor, " n"]]
    tokens: list[int]
    build: Callable[[Batch, Int[Tensor, " n"]], Rows]


def grouped(batch: Batch, max_tokens: int, layout: Layout = "plain") -> Groups:
    """Which sequences form which microbatch of `microbatches`. Raises InputError as there."""
    _require_on_cpu(batch)
    length_N = batch.prompt_length_N + batch.response_length_N
    longest = int(length_N.max())
    if longest > max_tokens:
        raise InputError(
            f"sequence {int(length_N.argmax())} has {longest} tokens, a microbatch may hold "
            f"{max_tokens}: raise max_tokens to at least {longest}"
        )
    parts = _padded(length_N, max_tokens)
    found = Groups(parts, [len(part) * int(length_N[part[0]]) for part in parts], plain_rows)
    whole = int(length_N.sum())
    if layout != "plain" and whole < PACKING * sum(found.tokens):
        order = length_N.argsort(descending=True, stable=True).tolist()
        found = Groups(*_filled([([i], int(length_N[i])) for i in order], max_tokens), _packed)
    if layout == "shared":
        first_N = _first_of_prompt(batch)
        units = _by_prompt(batch, first_N, max_tokens)
        if sum(tokens for _, tokens in units) < SHARING * sum(found.tokens):
            found = Groups(*_filled(units, max_tokens), partial(_packed, first_N=first_N))
    return found


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch.OutOfMemoryError, or one of those that go by another type.

    The CPU's allocator raises a plain RuntimeError; so do CUDA's libraries, for what they take beside
    torch's allocator (a kernel's code and stack, cuBLAS's workspace).
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)


def gather(values_NR: Float[Tensor, "N R"], rows: Rows) -> Float[Tensor, " T"]:
    """The entries of an [N, R] tensor at a microbatch's response tokens."""
    return values_NR[rows.sequence_T, rows.k_T]


def scatter(
    values: Sequence[Float[Tensor, " T"]], parts: Sequence[Rows], batch: Batch
) -> Float[Tensor, "N R"]:
    """Per-token values of all microbatches -> [N, R] in float64 on the CPU, zero elsewhere."""
    shape = (batch.tokens_NL.shape[0], int(batch.response_length_N.max()))
    index = (torch.cat([r.sequence_T for r in parts]), torch.cat([r.k_T for r in parts]))
    # Together on the device, so that a GPU is waited for once, not once a microbatch.
    flat = torch.cat(list(values)).to(device="cpu", dtype=torch.float64)
    return torch.zeros(shape, dtype=torch.float64).index_put(index, flat)


def _require_on_cpu(batch: Batch) -> None:
    """Rows are laid out there, where reading a length stops no device, and move one by one."""
    if away := [x.device for x in batch if x.device.type != "cpu"]:
        raise InputError(
            f"the batch is on {away[0]}, the CPU is expected, from where each microbatch goes to the "
            "device of the parameters: give Batch(*(x.cpu() for x in batch))"
        )


def _packed(batch: Batch, index_N: Tensor, first_N: Tensor | None = None) -> Rows:
    """One packed row; a plain one for a single token, which transformers takes for generation."""
    rows = packed_rows(batch, index_N, first_N)
    return rows if rows.tokens > 1 else plain_rows(batch, index_N)


def _padded(length_N: Tensor, max_tokens: int) -> list[Tensor]:
    """Groups of sequences, longest first, each of as many as fit when padded to its first."""
    order = length_N.argsort(descending=True, stable=True)
    parts, start = [], 0
    while start < len(order):
        count = max_tokens // int(length_N[order[start]])
        parts.append(order[start : start + count])
        start += count
    return parts


def _by_prompt(batch: Batch, first_N: Tensor, max_tokens: int) -> list[tuple[list[int], int]]:
    """(sequences that share a prompt, tokens with the prompt once); groups too large are split."""
    prompt_N, count_N = batch.prompt_length_N.tolist(), batch.response_length_N.tolist()
    members: dict[int, list[int]] = {}
    for i, first in enumerate(first_N.tolist()):
        members.setdefault(first, []).append(i)
    units: list[tuple[list[int], int]] = []
    for first, group in members.items():
        pieces = _cut([([i], count_N[i]) for i in group], max_tokens - prompt_N[first])
        units += [(piece, prompt_N[first] + tokens) for piece, tokens in pieces]
    # Neighbours attend in one block, so that their prompts should be of similar length.
    return sorted(units, key=lambda unit: -prompt_N[unit[0][0]])


def _filled(units: Sequence[tuple[list[int], int]], max_tokens: int) -> tuple[list[Tensor], list[int]]:
    runs = _cut(units, max_tokens)
    return [torch.tensor(members) for members, _ in runs], [tokens for _, tokens in runs]


def _cut(units: Sequence[tuple[list[int], int]], room: int) -> list[tuple[list[int], int]]:
    """Consecutive units (members, tokens) merged into runs of at most `room` tokens each."""
    runs: list[tuple[list[int], int]] = []
    for members, tokens in units:
        if runs and runs[-1][1] + tokens <= room:
            runs[-1] = (runs[-1][0] + members, runs[-1][1] + tokens)
        else:
            runs.append((list(members), tokens))
    return runs


def _first_of_prompt(batch: Batch) -> Int[Tensor, " N"]:
    """The first sequence with the same prompt: equal index and tokens, as the index may be wrong."""
    _, group_N = batch.prompt_N.unique(return_inverse=True)
    own_N = torch.arange(len(group_N))
    first_M = torch.full_like(own_N, len(own_N)).scatter_reduce(0, group_N, own_N, "amin")
    first_N = first_M[group_N]
    outside_NL = torch.arange(batch.tokens_NL.shape[1]) >= batch.prompt_length_N[:, None]
    same_N = ((batch.tokens_NL == batch.tokens_NL[first_N]) | outside_NL).all(1)
    same_N = same_N & (batch.prompt_length_N == batch.prompt_length_N[first_N])
    return torch.where(same_N, first_N, own_N)
