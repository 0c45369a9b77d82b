"""A frozen output embedding: log-probability, entropy and their derivatives, in closed form.

With the scores a, p = softmax(a), l = log p_y, h = -sum_v p_v log p_v, c = log p + h, <.> the
expectation under p, a' and a'' the scores' derivatives along a direction, d = a' - <a'>:

    dl/da_v = [v = y] - p_v      l' = a'_y - <a'>      l'' = a''_y - <a''> - <d^2>
    dh/da_v = -p_v c_v           h' = -<c a'>          h'' = -<c a''> - <(1 + c) d^2>

A gradient therefore needs, for l and for h, one row of the embedding's width per token. [n, V] tensors
exist for one chunk of n tokens at a time and are reused; `Readout.room` bounds their memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

# Three tensors of 128 tokens x 151,936 entries; a product of 64 rows takes 1.6 times as long per row.
BYTES = 224 * 2**20
MOST = 256  # tokens of a chunk of BYTES; larger ones are not faster on a CPU


class Readout(NamedTuple):
    """Scores a = u / temperature, or cap tanh(u / cap) / temperature, of u = W z + b."""

    weight_VD: Float[Tensor, "V D"]
    bias_V: Float[Tensor, " V"] | None
    softcap: float | None
    temperature: float
    room: int | None = None  # bytes of the [n, V] tensors of a chunk; None: BYTES, a CPU's


def tokens_of_chunk(readout: Readout, tensors: int) -> int:
    """How many tokens' rows of V scores, in float32 at least, fit `tensors` times; at least 1."""
    weight_VD, room = readout.weight_VD, BYTES if readout.room is None else readout.room
    dtype = torch.promote_types(weight_VD.dtype, torch.float32)
    size = room // (tensors * torch.finfo(dtype).bits // 8 * len(weight_VD))
    return max(1, min(MOST if readout.room is None else MOST * room // BYTES, size))


def values(
    hidden_TD: Float[Tensor, "T D"], target_T: Int[Tensor, " T"], readout: Readout
) -> tuple[Float[Tensor, " T"], ...]:
    """(l, h), nats, of every token; one product with the embedding."""

    def chunk(work: list[Tensor], hidden_nD: Tensor, target_n: Tensor) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout, *work)
        return _entry(at.logp_nV, target_n), at.entropy_n

    return _by_chunk(chunk, (hidden_TD, target_T), readout, most=3)


def rows(
    hidden_TD: Float[Tensor, "T D"], target_T: Int[Tensor, " T"], readout: Readout
) -> tuple[Tensor, ...]:
    """(l, h, dl/dz, dh/dz), the last two [T, D]; three products."""

    def chunk(work: list[Tensor], hidden_nD: Tensor, target_n: Tensor) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout, *work)
        mean_nD = _row(at.p_nV, at, readout)
        dlogp_nD = _target_row(at, target_n, readout) - mean_nD
        dentropy_nD = -_row(at.plogp_nV, at, readout) - at.entropy_n[:, None].to(mean_nD) * mean_nD
        return _entry(at.logp_nV, target_n), at.entropy_n, dlogp_nD, dentropy_nD

    return _by_chunk(chunk, (hidden_TD, target_T), readout, most=3)


def weighted_row(
    hidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    p_T: Float[Tensor, " T"],
    q_T: Float[Tensor, " T"],
    readout: Readout,
) -> Float[Tensor, "T D"]:
    """d/dz of p l + q h for every token, p and q held fixed; two products."""

    def chunk(
        work: list[Tensor], hidden_nD: Tensor, target_n: Tensor, p_n: Tensor, q_n: Tensor
    ) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout, *work)
        p_n1, q_n1 = p_n[:, None].to(at.p_nV), q_n[:, None].to(at.p_nV)
        # p (p + q c), in place of p
        weight_nV = torch.mul(at.p_nV, p_n1 + q_n1 * at.entropy_n[:, None], out=at.p_nV)
        weight_nV = torch.addcmul(weight_nV, q_n1, at.plogp_nV, out=weight_nV)
        return (p_n1 * _target_row(at, target_n, readout) - _row(weight_nV, at, readout),)

    return _by_chunk(chunk, (hidden_TD, target_T, p_T, q_T), readout, most=3)[0]


def along(
    hidden_TD: Float[Tensor, "T D"],
    dhidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    readout: Readout,
) -> tuple[Float[Tensor, " T"], ...]:
    """(l, h, l', h') along a direction of the hidden state; two products."""

    def chunk(
        work: list[Tensor], hidden_nD: Tensor, dhidden_nD: Tensor, target_n: Tensor
    ) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout, *work)
        logp_n = _entry(at.logp_nV, target_n)
        da_nV = _scaled(_product(dhidden_nD, readout, at.logp_nV), at.slope)
        mean_n = _mean(at.p_nV, da_nV)
        dentropy_n = -_mean(at.plogp_nV, da_nV) - at.entropy_n * mean_n
        return logp_n, at.entropy_n, _entry(da_nV, target_n) - mean_n, dentropy_n

    return _by_chunk(chunk, (hidden_TD, dhidden_TD, target_T), readout, most=3)


def twice_along(
    hidden_TD: Float[Tensor, "T D"],
    dhidden_TD: Float[Tensor, "T D"],
    ddhidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    readout: Readout,
) -> tuple[Float[Tensor, " T"], ...]:
    """(l, h, l', h', l'', h'') along a path of the hidden state; three products."""

    def chunk(
        work: list[Tensor],
        hidden_nD: Tensor,
        dhidden_nD: Tensor,
        ddhidden_nD: Tensor,
        target_n: Tensor,
    ) -> tuple[Tensor, ...]:
        *work, free_nV = work
        at = _softmax(hidden_nD, readout, *work)
        logp_n = _entry(at.logp_nV, target_n)
        du_nV = _product(dhidden_nD, readout, at.logp_nV)
        quadratic_nV = None if at.curvature_nV is None else at.curvature_nV * du_nV.square()
        da_nV = _scaled(du_nV, at.slope)
        mean_n = torch.mul(at.p_nV, da_nV, out=free_nV).sum(-1)
        d_nV = torch.sub(da_nV, mean_n[:, None], out=da_nV)
        dlogp_n = _entry(d_nV, target_n)
        # -<c a'> = -<log p d>, as the means of c and d are 0
        slope_nV = torch.mul(at.plogp_nV, d_nV, out=free_nV)
        dentropy_n = -slope_nV.sum(-1)
        skew_n = _mean(slope_nV, d_nV)
        variance_n = _mean(torch.mul(at.p_nV, d_nV, out=free_nV), d_nV)
        dda_nV = _scaled(_product(ddhidden_nD, readout, d_nV), at.slope)
        dda_nV = dda_nV if quadratic_nV is None else torch.add(dda_nV, quadratic_nV, out=dda_nV)
        mean2_n = torch.mul(at.p_nV, dda_nV, out=free_nV).sum(-1)
        ddlogp_n = _entry(dda_nV, target_n) - mean2_n - variance_n
        ddentropy_n = (
            -_mean(at.plogp_nV, dda_nV)
            - at.entropy_n * mean2_n
            - (1 + at.entropy_n) * variance_n
            - skew_n
        )
        return logp_n, at.entropy_n, dlogp_n, dentropy_n, ddlogp_n, ddentropy_n

    tensors = (hidden_TD, dhidden_TD, ddhidden_TD, target_T)
    return _by_chunk(chunk, tensors, readout, most=4)


class _Softmax(NamedTuple):
    """The distribution of every token, with slope = da/du and curvature = d2a/du2 (None: linear)."""

    logp_nV: Tensor
    p_nV: Tensor
    plogp_nV: Tensor
    entropy_n: Tensor
    slope: Tensor | float
    curvature_nV: Tensor | None


def _softmax(
    hidden_nD: Tensor, readout: Readout, p_nV: Tensor, logp_nV: Tensor, plogp_nV: Tensor
) -> _Softmax:
    """The distribution, written into the tensors given."""
    scores_nV = _product(hidden_nD, readout, p_nV)
    if readout.bias_V is not None:
        scores_nV = torch.add(scores_nV, readout.bias_V, out=scores_nV)
    slope: Tensor | float = 1 / readout.temperature
    curvature_nV = None
    if readout.softcap is not None:
        tanh_nV = torch.tanh(scores_nV / readout.softcap)
        scores_nV = torch.mul(tanh_nV, readout.softcap, out=scores_nV)
        slope = (1 - tanh_nV.square()) / readout.temperature
        curvature_nV = -2 / readout.softcap * tanh_nV * slope
    logp_nV = torch.log_softmax(_scaled(scores_nV, 1 / readout.temperature), -1, out=logp_nV)
    p_nV = torch.exp(logp_nV, out=p_nV)
    plogp_nV = torch.mul(p_nV, logp_nV, out=plogp_nV)
    return _Softmax(logp_nV, p_nV, plogp_nV, -plogp_nV.sum(-1), slope, curvature_nV)


def _product(hidden_nD: Tensor, readout: Readout, out_nV: Tensor) -> Tensor:
    """W z, in float32 at least, written into `out_nV`."""
    weight_VD = readout.weight_VD
    hidden_nD = hidden_nD.to(weight_VD.dtype)
    if weight_VD.dtype == out_nV.dtype:
        return torch.mm(hidden_nD, weight_VD.T, out=out_nV)
    return torch.add(linear(hidden_nD, weight_VD), 0.0, out=out_nV)


def _scaled(x_nV: Tensor, factor: Tensor | float) -> Tensor:
    """x * factor, in place."""
    return x_nV if isinstance(factor, float) and factor == 1 else torch.mul(x_nV, factor, out=x_nV)


def _mean(weight_nV: Tensor, x_nV: Tensor) -> Tensor:
    """sum_v w x; overwrites w."""
    return torch.mul(weight_nV, x_nV, out=weight_nV).sum(-1)


def _entry(x_nV: Tensor, target_n: Tensor) -> Tensor:
    return x_nV.gather(-1, target_n[:, None])[:, 0]


def _row(weight_nV: Tensor, at: _Softmax, readout: Readout) -> Tensor:
    """d/dz of sum_v w_v a_v, the w held fixed; overwrites w if the scores have a softcap."""
    weight_VD = readout.weight_VD
    if not isinstance(at.slope, float):
        return _scaled(weight_nV, at.slope).to(weight_VD.dtype) @ weight_VD
    return _scaled(weight_nV.to(weight_VD.dtype) @ weight_VD, at.slope)


def _target_row(at: _Softmax, target_n: Tensor, readout: Readout) -> Tensor:
    """da_y/dz."""
    row_nD = readout.weight_VD[target_n]
    if not isinstance(at.slope, float):
        return _entry(at.slope, target_n)[:, None].to(row_nD) * row_nD
    return _scaled(row_nD, at.slope)


def _by_chunk(
    chunk: Callable[..., tuple[Tensor, ...]], of_T: tuple[Tensor, ...], readout: Readout, most: int
) -> tuple[Tensor, ...]:
    """chunk() of runs of tokens, concatenated; each call gets `most` [n, V] tensors to write into.

    These are reused: new ones would cost a page fault every 4 KiB. A softcap needs five more.
    """
    weight_VD = readout.weight_VD
    dtype = torch.promote_types(weight_VD.dtype, torch.float32)
    halves = weight_VD.dtype != dtype  # one more for products and weights in half precision
    tensors = most + halves + 5 * (readout.softcap is not None)
    size = max(1, min(tokens_of_chunk(readout, tensors), len(of_T[0])))
    shape = (size, len(weight_VD))
    work = [torch.empty(shape, dtype=dtype, device=weight_VD.device) for _ in range(most)]
    outs = [
        chunk([w_nV[: len(parts[0])] for w_nV in work], *parts)
        for parts in zip(*(x_T.split(size) for x_T in of_T), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*outs, strict=True))
