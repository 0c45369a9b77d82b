"""Blocks in which the tokens of a packed row attend: rows of similar length, each to its own."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

ALIKE = 0.8  # least length of a row in an attention block, relative to its longest
QUERIES = 512  # of a span; its mask, and its scores where a kernel has them, are no larger
MASK = 2**24  # entries of a span's mask
HIDDEN = 2**62  # position of a key that nobody sees


def placed(x: Tensor, device: torch.device) -> Tensor:
    """A microbatch's tensor on a device: a GPU takes it from pinned memory, while the host goes on."""
    if device.type != "cuda" or not x.is_cpu:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Reach(NamedTuple):
    """Which of the earlier tokens a query sees, by the positions q >= k in their sequence.

    None sees all of them. The conventions are those of transformers.masking_utils (5.23), where a
    window includes the query's own token.
    """

    window: int | None = None  # seen: k > q - window
    chunk: int | None = None  # seen: k // chunk == q // chunk

    def all_up_to(self, position: int) -> bool:
        """Whether a query at this position, and so each before it, sees all that is before it."""
        return all(size is None or position < size for size in self)

    def first(self, query: Int[Tensor, "*a"]) -> Int[Tensor, "*a"]:
        """The earliest position that a query sees."""
        first = torch.zeros_like(query)
        if self.window is not None:
            first = first.maximum(query - self.window + 1)
        if self.chunk is not None:
            first = first.maximum(query // self.chunk * self.chunk)
        return first

    def sees(self, query: Int[Tensor, "*a"], key: Int[Tensor, "*b"]) -> Bool[Tensor, "*c"]:
        """Of positions that broadcast; earlier keys are a mask's own matter."""
        seen = torch.ones_like(query - key, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.chunk is not None:
            seen = seen & (key // self.chunk == query // self.chunk)
        return seen


class Seen(NamedTuple):
    """Which keys the queries see, by the positions of both: none that is later or out of reach.

    A mask of all queries and keys would grow with the square of the length: there is one for a span at
    a time, made when it is asked for.
    """

    query_nQ: Int[Tensor, "#n Q"]  # positions
    key_nK: Int[Tensor, "#n K"]
    reach: Reach
    spans: tuple[tuple[slice, slice], ...]  # runs of queries, and the keys that one of them sees

    def mask(self, queries: slice, keys: slice) -> Bool[Tensor, "#n 1 q k"]:
        query_nQ1, key_n1K = self.query_nQ[:, queries, None], self.key_nK[:, None, keys]
        return ((key_n1K <= query_nQ1) & self.reach.sees(query_nQ1, key_n1K))[:, None]


class Block(NamedTuple):
    """Rows of similar length that attend in one kernel call, as indices into the packed row."""

    query_nQ: Int[Tensor, "n Q"] | None  # None: the n Q consecutive tokens from `start`
    start: int
    shape: tuple[int, int]  # n, Q
    key_nK: Int[Tensor, "n K"] | None = None  # None: the queries' own tokens
    seen: Seen | None = None  # None: causal attention, a row being a sequence from its first token on


class Packing(NamedTuple):
    """Structure of a packed row: positions, and the blocks in which its tokens attend."""

    position_1S: Int[Tensor, "1 S"]
    blocks: tuple[Block, ...]
    place_S: Int[Tensor, " S"] | None  # index of a token in the blocks' outputs; None: in order

    def to(self, device: torch.device) -> "Packing":
        """The same packing with its tensors on a device."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else placed(x, device)

        def moved(seen: Seen | None) -> Seen | None:
            if seen is None:
                return None
            query_nQ, key_nK = placed(seen.query_nQ, device), placed(seen.key_nK, device)
            return seen._replace(query_nQ=query_nQ, key_nK=key_nK)

        blocks = tuple(
            b._replace(query_nQ=move(b.query_nQ), key_nK=move(b.key_nK), seen=moved(b.seen))
            for b in self.blocks
        )
        return Packing(placed(self.position_1S, device), blocks, move(self.place_S))


class Segments(NamedTuple):
    """Runs of tokens of a packed row: those that attend within themselves, then those after prompts."""

    start_n: Int[Tensor, " n"]
    length_n: Int[Tensor, " n"]
    causal: int  # number of the former
    prompt_start_m: Int[Tensor, " m"]  # of the latter
    prompt_length_m: Int[Tensor, " m"]


def packing(
    position_S: Int[Tensor, " S"],
    segments: Segments,
    of_S: Int[Tensor, " S"],
    offset_S: Int[Tensor, " S"],
) -> Packing:
    """Attention in blocks; token s is the `offset_S`-th of segment `of_S`. Both kinds longest first."""
    length_n, causal = segments.length_n, segments.causal
    blocks: list[Block] = []
    places: list[Tensor] = []  # index of every segment's first token in the blocks' outputs
    done = 0
    runs = (*_alike(length_n, 0, causal), *_alike(length_n, causal, len(length_n)))
    for run in runs:
        block, first_n = _causal(segments, run) if run.start < causal else _after(segments, run)
        n, width = block.shape
        blocks.append(block)
        places.append(done + width * torch.arange(n) + first_n)
        done += n * width
    even = done == len(of_S)
    place_S = None if even else torch.cat(places)[of_S] + offset_S
    return Packing(position_S[None], tuple(blocks), place_S)


def within(packing: Packing, reach: Reach) -> Packing:
    """The same packing where every token sees only what is in reach of it.

    Blocks of tokens that reach all before them stay as they are, and so do their faster kernels.
    """
    return packing._replace(blocks=tuple(_within(b, reach) for b in packing.blocks))


def _within(block: Block, reach: Reach) -> Block:
    if block.seen is not None:
        query_nQ, key_nK = block.seen.query_nQ, block.seen.key_nK
    else:
        query_nQ = key_nK = torch.arange(block.shape[1])[None]
    if reach.all_up_to(int(query_nQ.max())):
        return block
    # No query is left without a key, its own, which padding has as well.
    return block._replace(seen=_seen(query_nQ, key_nK, reach))


def _seen(query_nQ: Tensor, key_nK: Tensor, reach: Reach) -> Seen:
    if bool((query_nQ == query_nQ[:1]).all()) and bool((key_nK == key_nK[:1]).all()):
        query_nQ, key_nK = query_nQ[:1], key_nK[:1]
    count = query_nQ.shape[1]
    size = max(1, min(QUERIES, MASK // key_nK.numel()))
    spans = []
    for start in range(0, count, size):
        own = slice(start, min(start + size, count))
        first_n1, last_n1 = reach.first(query_nQ[:, start, None]), query_nQ[:, own.stop - 1, None]
        (at,) = ((key_nK >= first_n1) & (key_nK <= last_n1)).any(0).nonzero(as_tuple=True)
        spans.append((own, slice(int(at[0]), int(at[-1]) + 1)))
    return Seen(query_nQ, key_nK, reach, tuple(spans))


def _causal(segments: Segments, run: slice) -> tuple[Block, Tensor]:
    """Segments that attend within themselves, and where each begins in its row of the block."""
    length_n, width = segments.length_n[run], int(segments.length_n[run.start])
    even = int(length_n[-1]) == width
    query_nQ = None if even else _own(segments, run)
    block = Block(query_nQ, int(segments.start_n[run.start]), (len(length_n), width))
    return block, torch.zeros_like(length_n)


def _after(segments: Segments, run: slice) -> tuple[Block, Tensor]:
    """The same of segments that attend to their prompts as well.

    Where the prompts are short, causal attention of whole sequences, the outputs at the prompts left
    unused, is less work than attention with a mask, of which a kernel computes what is hidden.
    """
    of_prompt = slice(run.start - segments.causal, run.stop - segments.causal)
    p_n1 = segments.prompt_length_m[of_prompt, None]
    from_n1 = segments.prompt_start_m[of_prompt, None]
    length_n1, n = segments.length_n[run, None], run.stop - run.start
    width, longest = int(length_n1.max()), int(p_n1.max())
    if 2 * longest <= width:
        whole_n1 = p_n1 + length_n1
        k_nQ = torch.arange(int(whole_n1.max())).clamp(max=whole_n1 - 1)
        query_nQ = torch.where(k_nQ < p_n1, from_n1 + k_nQ, segments.start_n[run, None] + k_nQ - p_n1)
        return Block(query_nQ, 0, (n, query_nQ.shape[1])), p_n1[:, 0]
    p_K, own_nQ = torch.arange(longest), _own(segments, run)
    position_nQ = p_n1 + torch.arange(width)  # that of padding goes on, so that no token sees it
    position_nK = torch.cat([torch.where(p_K < p_n1, p_K, HIDDEN), position_nQ], 1)
    even = bool((length_n1 == width).all())
    block = Block(
        query_nQ=None if even else own_nQ,
        start=int(segments.start_n[run.start]),
        shape=(n, width),
        key_nK=torch.cat([from_n1 + p_K.clamp(max=p_n1 - 1), own_nQ], 1),
        seen=_seen(position_nQ, position_nK, Reach()),
    )
    return block, torch.zeros_like(p_n1[:, 0])


def _own(segments: Segments, run: slice) -> Int[Tensor, "n Q"]:
    """Tokens of the segments, the last one repeated up to the longest's length."""
    length_n1 = segments.length_n[run, None]
    k_nQ = torch.arange(int(length_n1.max())).clamp(max=length_n1 - 1)
    return segments.start_n[run, None] + k_nQ


def _alike(length: Tensor, low: int, high: int) -> list[slice]:
    """The segments low..high, of descending length, split into runs of similar length."""
    cuts = []
    while low < high:
        similar = low + int((length[low:high] >= ALIKE * length[low]).sum())
        cuts.append(slice(low, similar))
        low = similar
    return cuts
