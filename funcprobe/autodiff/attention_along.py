"""Derivatives of softmax(scale Q K^T + mask) V along a direction, a block of queries at a time.

With S the scores, P = softmax(S), <.> the expectation under a row of P, primes for derivatives along
the direction, and T for the transpose:

    S'  = scale (Q' K^T + Q K'^T)                   P'  = P * d,  d = S' - <S'>
    S'' = scale (Q'' K^T + 2 Q' K'^T + Q K''^T)     P'' = P * (S'' - <S''> + d^2 - <d^2>)
    O'  = P' V + P V'                               O'' = P'' V + 2 P' V' + P V''

A block meets only the keys that one of its queries sees, all of them at once, so that each softmax is
over whole rows. Scores exist for one block and are overwritten by the next. Queries whose heads share a
key are rows of one product, whose inner dimensions hold Q and Q', and K and K'.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SCORES = {"cpu": 2**22, "other": 2**26}  # bytes of a block's scores; a CPU's caches hold a few of these
PRODUCT_ROWS = 256  # queries of a block, those of all heads that share a key counted

Mask = Bool[Tensor, "..."] | Float[Tensor, "..."] | None


def attention_along(
    at: Sequence[Tensor],
    moved: Sequence[Tensor],
    mask: Mask,
    is_causal: bool,
    scale: float | None,
) -> Float[Tensor, "n H Q d"]:
    """O' from `at` = (query, key, value, output) and `moved`, the tangents of the first three.

    Query and output are [n, H, Q, d], key and value [n, h, K, d], where h divides H. Five products of
    queries and keys that see each other, of which the values take two.
    """
    query, key, value, out = at
    dquery, dkey, dvalue = moved
    width = query.shape[-1]
    both_q = _grouped(_scaled([dquery, query], scale), key)
    both_k, value, dvalue = torch.cat([key, dkey], -1), value.contiguous(), dvalue.contiguous()
    along = torch.empty_like(out)
    out_grouped, along_grouped = _grouped(out, key), _grouped(along, key)
    for block in _blocks(query, key, mask, is_causal, buffers=2):
        q, k, v, dv = block.queries_of(both_q), *map(block.keys_of, (both_k, value, dvalue))
        p, e = block.scores
        block.probabilities(q[..., width:], k[..., :width], p)
        # Q' K^T + Q K'^T as one product with twice the inner dimension
        torch.mul(torch.bmm(q, k.mT, out=e), p, out=e)
        # P' V = E V - rowsum(E) O with E = P * S'
        mean = e.sum(-1, keepdim=True)
        moved_out = _plus_product(torch.bmm(p, dv), e, v)
        moved_out = torch.addcmul(moved_out, mean, block.queries_of(out_grouped), value=-1)
        block.write(moved_out, along_grouped)
    return along


def attention_twice_along(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    mask: Mask,
    is_causal: bool,
    scale: float | None,
) -> Sequence[Float[Tensor, "n H Q d"]]:
    """(O, O', O''); query, key and value each come as (value, first, second derivative).

    Shapes as in `attention_along`; twelve products.
    """
    width, depth = query[0].shape[-1], value[0].shape[-1]
    # Taylor's coefficients, (x, x', x''/2): with them the terms of each order are one product.
    all_q = _grouped(_scaled([query[2] / 2, query[1], query[0]], scale), key[0])
    all_k = torch.cat([key[0], key[1], key[2] / 2], -1)
    all_v = torch.cat([value[0], value[1], value[2] / 2], -1)
    outs = [query[0].new_empty(*query[0].shape[:-1], depth) for _ in range(3)]
    grouped = [_grouped(out, key[0]) for out in outs]
    for block in _blocks(query[0], key[0], mask, is_causal, buffers=3):
        q, k, v = block.queries_of(all_q), block.keys_of(all_k), block.keys_of(all_v)
        p, d, dp = block.scores
        block.probabilities(q[..., 2 * width :], k[..., :width], p)
        out, first, second = torch.bmm(p, v).split(depth, -1)
        torch.bmm(q[..., width:], k[..., : 2 * width].mT, out=d)
        torch.sub(d, torch.mul(p, d, out=dp).sum(-1, keepdim=True), out=d)
        torch.mul(p, d, out=dp)
        first_too, second_too = torch.bmm(dp, v[..., : 2 * depth]).split(depth, -1)
        squared = torch.mul(dp, d, out=dp)
        # P'' / 2 but for a multiple of P, which is subtracted from the output
        ddp = torch.mul(torch.bmm(q, k.mT, out=d), p, out=d)
        torch.add(ddp, squared, alpha=0.5, out=ddp)
        mean = ddp.sum(-1, keepdim=True)
        second = _plus_product(second + second_too, ddp, v[..., :depth])
        second = torch.addcmul(second, mean, out, value=-1)
        for of_block, whole in zip((out, first + first_too, 2 * second), grouped, strict=True):
            block.write(of_block, whole)
    return outs


class _Block(NamedTuple):
    """Queries of some rows and heads, the keys that one of them sees, and room for their scores."""

    rows: slice
    heads: slice  # of keys
    queries: slice
    keys: slice
    bias: Float[Tensor, "#r #h #g q #k"] | None  # added to the scores of the last keys
    empty: Bool[Tensor, "#r #h #g q 1"] | None  # sees no key at all: its bias is 0
    scores: Sequence[Float[Tensor, "rh gq k"]]

    def queries_of(self, x: Float[Tensor, "n h g Q d"]) -> Float[Tensor, "rh gq d"]:
        return x[self.rows, self.heads, :, self.queries].flatten(0, 1).flatten(1, 2)

    def keys_of(self, x: Float[Tensor, "n h K d"]) -> Float[Tensor, "rh k d"]:
        return x[self.rows, self.heads, self.keys].flatten(0, 1)

    def probabilities(self, query: Tensor, key: Tensor, into: Tensor) -> None:
        """softmax(query key^T + mask), finite also for a query that sees no key."""
        torch.bmm(query, key.mT, out=into)
        if self.bias is not None:
            rows, heads, queries = (s.stop - s.start for s in (self.rows, self.heads, self.queries))
            scores = into.view(rows, heads, -1, queries, into.shape[-1])[..., -self.bias.shape[-1] :]
            torch.add(scores, self.bias, out=scores)
        torch.softmax(into, -1, out=into)

    def write(self, of_block: Tensor, whole: Float[Tensor, "n h g Q d"]) -> None:
        """0 for a query that sees no key, as in torch's attention."""
        place = self.rows, self.heads, slice(None), self.queries
        of_block = of_block.view(whole[place].shape)
        whole[place] = of_block if self.empty is None else of_block.masked_fill(self.empty, 0)


def _scaled(parts: Sequence[Tensor], scale: float | None) -> Tensor:
    together = torch.cat(list(parts), -1)
    scale = parts[0].shape[-1] ** -0.5 if scale is None else scale
    return torch.mul(together, scale, out=together)


def _plus_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, in place."""
    torch.baddbmm(x, a, b, out=x)
    return x


def _grouped(x: Float[Tensor, "n H Q d"], key: Float[Tensor, "n h K d"]) -> Float[Tensor, "n h g Q d"]:
    n, _, *rest = x.shape
    return x.view(n, key.shape[1], -1, *rest)


def _blocks(
    query: Float[Tensor, "n H Q d"],
    key: Float[Tensor, "n h K d"],
    mask: Mask,
    is_causal: bool,
    buffers: int,
) -> Iterator[_Block]:
    """The blocks of queries, each with the heads and rows that SCORES has room for."""
    (n, heads, keys), groups = key.shape[:3], query.shape[1] // key.shape[1]
    count = query.shape[2]
    device = query.device.type
    room = SCORES.get(device, SCORES["other"]) // query.element_size()
    most = max(1, min(count, PRODUCT_ROWS // groups, room // (groups * keys)))
    # As even as possible: a last block of few queries would be a slow product.
    size = -(-count // -(-count // most))
    work = [query.new_empty(0)] * buffers
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(*mask.shape[:2], count, keys)
        mask = mask.unflatten(1, (1, 1) if mask.shape[1] == 1 else (heads, groups))
    triangle = query.new_full((size, size), -torch.inf).triu(1) if is_causal else None
    for start in range(0, count, size):
        own = slice(start, min(start + size, count))
        seen, bias, empty = slice(0, keys), None, None
        if triangle is not None:
            seen = slice(0, min(own.stop, keys))
            inside = max(seen.stop - start, 0)  # keys that only some of the block's queries see
            bias = triangle[: own.stop - start, :inside] if inside else None
        elif mask is not None:
            seen, bias, empty = _bias(mask[..., own, :], query)
        each = (own.stop - start) * groups * (seen.stop - seen.start)
        most_heads = max(1, min(n * heads, room // each))
        step_n, step_h = max(1, most_heads // heads), min(heads, most_heads)
        if work[0].numel() < step_n * step_h * each:
            work = [query.new_empty(step_n * step_h * each) for _ in range(buffers)]
        for row in range(0, n, step_n):
            for head in range(0, heads, step_h):
                rows, some = slice(row, min(row + step_n, n)), slice(head, min(head + step_h, heads))
                of_bias, of_empty = (_of(x, rows, some) for x in (bias, empty))
                shape = (
                    (rows.stop - row) * (some.stop - head),
                    groups * (own.stop - start),
                    seen.stop - seen.start,
                )
                scores = [w[: shape[0] * shape[1] * shape[2]].view(shape) for w in work]
                yield _Block(rows, some, own, seen, of_bias, of_empty, scores)


def _bias(
    mask: Bool[Tensor, "#n #h #g q K"] | Float[Tensor, "#n #h #g q K"], query: Tensor
) -> tuple[slice, Tensor, Tensor]:
    """(keys seen, what is added to their scores, queries that see none of them)."""
    visible = mask if mask.dtype == torch.bool else mask != -torch.inf
    keys = slice(0, mask.shape[-1])
    if mask.device.type == "cpu":  # elsewhere reading a value would stop the device
        (at,) = visible.any(dim=(0, 1, 2, 3)).nonzero(as_tuple=True)
        keys = slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 1)
        mask, visible = mask[..., keys], visible[..., keys]
    empty = ~visible.any(-1, keepdim=True)
    if mask.dtype == torch.bool:
        bias = query.new_zeros(visible.shape).masked_fill(~(visible | empty), -torch.inf)
        return keys, bias, empty
    return keys, mask.masked_fill(empty, 0), empty


def _of(x: Tensor | None, rows: slice, heads: slice) -> Tensor | None:
    """Of a tensor whose first two dimensions may be 1, for all rows or heads; or a triangle."""
    if x is None or x.dim() == 2:
        return x
    return x[rows if len(x) > 1 else slice(None), heads if x.shape[1] > 1 else slice(None)]
