"""KL(p_theta || p_ref) of the next-token distributions of every response token, and its derivative.

p_ref is the same model with other values of its registry, as `base_params` gives them: no second model.
With the scores a, p = softmax(a), q that of the reference, g = log p - log q, a' the derivative of the
scores along a direction, and < > the expectation under p:

    KL = <g>      KL' = <g a'> - <g> <a'>

[n, V] tensors exist for one chunk of n tokens at a time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp

from .. import tree
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS
from ..policy.readout import tokens_of_chunk
from ..policy.rows import Rows
from ..types import Batch, Params
from .head import PLAIN_CHUNK
from .microbatches import per_token
from .tangents import aligned, hidden_along

TENSORS = 8  # [n, V] of a chunk at once


class KlAlong(NamedTuple):
    """KL to the reference, nats: at theta, its tangent along v, and at theta + eta v for every eta."""

    kl_NR: Float[Tensor, "N R"]
    tangent_NR: Float[Tensor, "N R"]  # per unit of eta
    moved: tuple[Float[Tensor, "N R"], ...]


def token_kl(
    params: Params, reference: Params, batch: Batch, forward: Forward, max_tokens: int = MAX_TOKENS
) -> Float[Tensor, "N R"]:
    """sum_u p(u) (log p(u) - log p_ref(u)) at the prefix of every response token, nats, [N, R].

    p and p_ref are the policy at `params` and at `reference`, at the temperature of `forward`. Two
    forwards. Raises ValueError if `reference` has other names or shapes than `params`.
    """
    return kl_at([params], reference, batch, forward, max_tokens)[0]


def kl_at(
    points: Sequence[Params],
    reference: Params,
    batch: Batch,
    forward: Forward,
    max_tokens: int = MAX_TOKENS,
) -> list[Float[Tensor, "N R"]]:
    """`token_kl` at each of several parameters, by a forward at each and one at the reference."""
    pairs = [aligned(params, reference, "reference") for params in points]
    there, reference = [params for params, _ in pairs], pairs[0][1]

    def chunk(of_ref_nD: Tensor, *moved: Tensor) -> tuple[Tensor, ...]:
        log_q_nV = _log_softmax(forward.logits(reference, of_ref_nD))
        logits = [forward.logits(x, x_nD) for x, x_nD in zip(there, moved, strict=True)]
        return tuple(_kl(_log_softmax(scores_nV), log_q_nV) for scores_nV in logits)

    def one(rows: Rows) -> tuple[Tensor, ...]:
        hidden = [forward.hidden(given, rows) for given in (reference, *there)]
        return _by_chunk(chunk, hidden, forward)

    return _of_batch(one, len(points), batch, forward, max_tokens)


def kl_along(
    params: Params,
    reference: Params,
    batch: Batch,
    direction: Params,
    forward: Forward,
    etas: Sequence[float] = (),
    max_tokens: int = MAX_TOKENS,
) -> KlAlong:
    """`token_kl` at theta, its derivative along v at eta = 0, and `token_kl` at theta + eta v.

    A pass of tangents, and one forward at the reference and for each eta. Raises ValueError if
    `reference` or `direction` have other names or shapes than `params`, InputError inside a transform
    that differentiates them.
    """
    _, reference = aligned(params, reference, "reference")
    params, direction = aligned(params, direction)
    there = [tree.axpy(eta, direction, params) for eta in etas]

    def chunk(
        of_ref_nD: Tensor, hidden_nD: Tensor, dhidden_nD: Tensor, *moved: Tensor
    ) -> tuple[Tensor, ...]:
        log_q_nV = _log_softmax(forward.logits(reference, of_ref_nD))
        scores_nV, slope_nV = jvp(forward.logits, (params, hidden_nD), (direction, dhidden_nD))  # type: ignore[misc]
        log_p_nV = _log_softmax(scores_nV)
        p_nV, slope_nV = log_p_nV.exp(), slope_nV.to(log_p_nV)
        kl_n = _kl(log_p_nV, log_q_nV)
        gained_n = (p_nV * (log_p_nV - log_q_nV) * slope_nV).sum(-1)
        found = [
            _kl(_log_softmax(forward.logits(given, moved_nD)), log_q_nV)
            for given, moved_nD in zip(there, moved, strict=True)
        ]
        return kl_n, gained_n - kl_n * (p_nV * slope_nV).sum(-1), *found

    def one(rows: Rows) -> tuple[Tensor, ...]:
        along = hidden_along(params, rows, direction, forward)
        moved = [forward.hidden(given, rows) for given in there]
        return _by_chunk(chunk, [forward.hidden(reference, rows), *along, *moved], forward)

    kl_NR, tangent_NR, *moved = _of_batch(one, 2 + len(etas), batch, forward, max_tokens)
    return KlAlong(kl_NR, tangent_NR, tuple(moved))


def _kl(log_p_nV: Tensor, log_q_nV: Tensor) -> Float[Tensor, " n"]:
    return (log_p_nV.exp() * (log_p_nV - log_q_nV)).sum(-1)


def _log_softmax(scores_nV: Tensor) -> Tensor:
    wide = torch.promote_types(scores_nV.dtype, torch.float32)
    return torch.log_softmax(scores_nV.to(wide), dim=-1)


def _by_chunk(
    chunk: Callable[..., tuple[Tensor, ...]], of_T: Sequence[Tensor], forward: Forward
) -> tuple[Tensor, ...]:
    # Without a readout the size of the vocabulary is the head's own affair.
    size = PLAIN_CHUNK if forward.readout is None else tokens_of_chunk(forward.readout, TENSORS)
    outs = [chunk(*parts) for parts in zip(*(x_T.split(size) for x_T in of_T), strict=True)]
    return tuple(torch.cat(column) for column in zip(*outs, strict=True))


def _of_batch(
    one: Callable[[Rows], tuple[Tensor, ...]],
    columns: int,
    batch: Batch,
    forward: Forward,
    max_tokens: int,
) -> list[Float[Tensor, "N R"]]:
    with torch.no_grad():
        return per_token(one, columns, batch, max_tokens, forward)
