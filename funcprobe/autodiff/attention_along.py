"""Derivatives of softmax(scale Q K^T + mask) V along a direction, a few rows of a batch at a time.

With S the scores, P = softmax(S), <.> the expectation under a row of P, primes for derivatives along
the direction, and T for the transpose:

    S'  = scale (Q' K^T + Q K'^T)                   P'  = P * d,  d = S' - <S'>
    S'' = scale (Q'' K^T + 2 Q' K'^T + Q K''^T)     P'' = P * (S'' - <S''> + d^2 - <d^2>)
    O'  = P' V + P V'                               O'' = P'' V + 2 P' V' + P V''
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SCORES = 2**24  # attention scores held at once in each intermediate tensor

Mask = Bool[Tensor, "..."] | Float[Tensor, "..."] | None


def attention_along(
    at: Sequence[Tensor],
    moved: Sequence[Tensor],
    mask: Mask,
    is_causal: bool,
    scale: float | None,
) -> Float[Tensor, "n H Q d"]:
    """O' from `at` = (query, key, value, output) and `moved`, the tangents of the first three.

    All are [n, H, Q, d] or [n, H, K, d].
    """
    (out,) = _by_rows(_first, at[1].shape[-2], [*at, *moved], mask, is_causal, scale)
    return out


def attention_twice_along(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    mask: Mask,
    is_causal: bool,
    scale: float | None,
) -> Sequence[Float[Tensor, "n H Q d"]]:
    """(O, O', O''); query, key and value each come as (value, first, second derivative)."""
    given = [*query, *key, *value]
    return _by_rows(_second, key[0].shape[-2], given, mask, is_causal, scale)


def _first(given: Sequence[Tensor], mask: Mask, scale: float) -> tuple[Tensor, ...]:
    query, key, value, out, dquery, dkey, dvalue = given
    p = _probabilities((scale * query) @ key.mT, mask)
    # Q' K^T + Q K'^T as one product with twice the inner dimension
    e = p * (torch.cat([scale * dquery, scale * query], -1) @ torch.cat([key, dkey], -1).mT)
    # P' V = E V - rowsum(E) O with E = P * S'
    return (e @ value + p @ dvalue - e.sum(-1, keepdim=True) * out,)


def _second(given: Sequence[Tensor], mask: Mask, scale: float) -> tuple[Tensor, ...]:
    query, dquery, ddquery, key, dkey, ddkey, value, dvalue, ddvalue = given
    query, dquery, ddquery = scale * query, scale * dquery, scale * ddquery
    p = _probabilities(query @ key.mT, mask)
    d = torch.cat([dquery, query], -1) @ torch.cat([key, dkey], -1).mT
    d = d - (p * d).sum(-1, keepdim=True)
    dp = p * d
    ddscores = torch.cat([ddquery, 2 * dquery, query], -1) @ torch.cat([key, dkey, ddkey], -1).mT
    ddp = p * torch.addcmul(ddscores, d, d)
    ddp = ddp - p * ddp.sum(-1, keepdim=True)
    # One product each for P and P': the values that each multiplies are concatenated.
    of_p = p @ torch.cat([value, dvalue, ddvalue], -1)
    of_dp = dp @ torch.cat([value, 2 * dvalue], -1)
    out, first, second = of_p.split(value.shape[-1], -1)
    first_too, second_too = of_dp.split(value.shape[-1], -1)
    return out, first + first_too, second + second_too + ddp @ value


def _probabilities(scores: Tensor, mask: Mask) -> Tensor:
    """softmax(scores + mask); 0 for a query that attends to no key, as in torch's attention."""
    if mask is None:
        return torch.softmax(scores, -1)
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    masked = scores.masked_fill(hidden, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(masked, -1).masked_fill(hidden.all(-1, keepdim=True), 0)


def _by_rows(
    f: Callable[[Sequence[Tensor], Mask, float], tuple[Tensor, ...]],
    keys: int,
    given: Sequence[Tensor],
    mask: Mask,
    is_causal: bool,
    scale: float | None,
) -> Sequence[Tensor]:
    """f of as many rows at a time as SCORES allows, concatenated; `given` starts with the query."""
    query = given[0]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        mask = query.new_ones(query.shape[-2], keys, dtype=torch.bool).tril()
    rows = max(1, SCORES // (query.shape[1] * query.shape[2] * keys))
    outs = []
    for i in range(0, len(query), rows):
        part = slice(i, i + rows)
        own = mask is not None and mask.dim() == 4 and len(mask) > 1
        of_part = mask[part] if mask is not None and own else mask
        outs.append(f([x[part] for x in given], of_part, scale))
    return outs[0] if len(outs) == 1 else [torch.cat(column) for column in zip(*outs, strict=True)]
