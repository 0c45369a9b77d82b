"""A frozen output embedding: log-probability, entropy and their derivatives, in closed form.

With the scores a, p = softmax(a), l = log p_y, h = -sum_v p_v log p_v, c = log p + h, <.> the mean over
p and a', a'' the scores' derivatives along a direction, d = a' - <a'>:

    dl/da_v = [v = y] - p_v      l' = a'_y - <a'>      l'' = a''_y - <a''> - <d^2>
    dh/da_v = -p_v c_v           h' = -<c a'>          h'' = -<c a''> - <(1 + c) d^2>

so that one row of the embedding's width each is all that a gradient needs of a token. [n, V] tensors
exist for a chunk of n tokens at a time: `BYTES` is what a chunk may take.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

BYTES = 200 * 2**20
MOST = 256  # tokens of a chunk; larger ones buy no time


class Readout(NamedTuple):
    """Scores a = u / temperature, or cap tanh(u / cap) / temperature, of u = W z + b."""

    weight_VD: Float[Tensor, "V D"]
    bias_V: Float[Tensor, " V"] | None
    softcap: float | None
    temperature: float


def values(
    hidden_TD: Float[Tensor, "T D"], target_T: Int[Tensor, " T"], readout: Readout
) -> tuple[Float[Tensor, " T"], ...]:
    """(l, h), nats, of every token; one product with the embedding."""

    def chunk(hidden_nD: Tensor, target_n: Tensor) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout)
        return _entry(at.logp_nV, target_n), at.entropy_n

    # In the chunks of `along`: then its values are these to the bit.
    return _by_chunk(chunk, (hidden_TD, target_T), readout, most=5)


def rows(
    hidden_TD: Float[Tensor, "T D"], target_T: Int[Tensor, " T"], readout: Readout
) -> tuple[Tensor, ...]:
    """(l, h, dl/dz, dh/dz), the last two [T, D]; three products."""

    def chunk(hidden_nD: Tensor, target_n: Tensor) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout)
        mean_nD = _row(at.p_nV, at, readout)
        dlogp_nD = _target_row(at, target_n, readout) - mean_nD
        dentropy_nD = -_row(at.plogp_nV, at, readout) - at.entropy_n[:, None].to(mean_nD) * mean_nD
        return _entry(at.logp_nV, target_n), at.entropy_n, dlogp_nD, dentropy_nD

    return _by_chunk(chunk, (hidden_TD, target_T), readout, most=4)


def weighted_row(
    hidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    p_T: Float[Tensor, " T"],
    q_T: Float[Tensor, " T"],
    readout: Readout,
) -> Float[Tensor, "T D"]:
    """d/dz of p l + q h for every token, p and q held fixed; two products."""

    def chunk(hidden_nD: Tensor, target_n: Tensor, p_n: Tensor, q_n: Tensor) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout)
        p_n1, q_n1 = p_n[:, None].to(at.p_nV), q_n[:, None].to(at.p_nV)
        factor_n1 = p_n1 + q_n1 * at.entropy_n[:, None]
        weight_nV = torch.addcmul(factor_n1 * at.p_nV, q_n1, at.plogp_nV)  # p (p + q c)
        return (p_n1 * _target_row(at, target_n, readout) - _row(weight_nV, at, readout),)

    return _by_chunk(chunk, (hidden_TD, target_T, p_T, q_T), readout, most=5)[0]


def along(
    hidden_TD: Float[Tensor, "T D"],
    dhidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    readout: Readout,
) -> tuple[Float[Tensor, " T"], ...]:
    """(l, h, l', h') along a direction of the hidden state; two products."""

    def chunk(hidden_nD: Tensor, dhidden_nD: Tensor, target_n: Tensor) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout)
        da_nV = _scaled(_product(dhidden_nD, readout), at.slope)
        mean_n = _dot(at.p_nV, da_nV)
        return (
            _entry(at.logp_nV, target_n),
            at.entropy_n,
            _entry(da_nV, target_n) - mean_n,
            -_dot(at.plogp_nV, da_nV) - at.entropy_n * mean_n,
        )

    return _by_chunk(chunk, (hidden_TD, dhidden_TD, target_T), readout, most=5)


def twice_along(
    hidden_TD: Float[Tensor, "T D"],
    dhidden_TD: Float[Tensor, "T D"],
    ddhidden_TD: Float[Tensor, "T D"],
    target_T: Int[Tensor, " T"],
    readout: Readout,
) -> tuple[Float[Tensor, " T"], ...]:
    """(l, h, l', h', l'', h'') along a path of the hidden state; three products."""

    def chunk(
        hidden_nD: Tensor, dhidden_nD: Tensor, ddhidden_nD: Tensor, target_n: Tensor
    ) -> tuple[Tensor, ...]:
        at = _softmax(hidden_nD, readout)
        du_nV = _product(dhidden_nD, readout)
        da_nV = _scaled(du_nV, at.slope)
        dda_nV = _scaled(_product(ddhidden_nD, readout), at.slope)
        if at.bend_nV is not None:
            dda_nV = torch.addcmul(dda_nV, at.bend_nV, du_nV.square())
        mean_n, mean2_n = _dot(at.p_nV, da_nV), _dot(at.p_nV, dda_nV)
        d_nV = da_nV - mean_n[:, None]
        variance_n = _dot(at.p_nV * d_nV, d_nV)
        return (
            _entry(at.logp_nV, target_n),
            at.entropy_n,
            _entry(d_nV, target_n),
            -_dot(at.plogp_nV, da_nV) - at.entropy_n * mean_n,
            _entry(dda_nV, target_n) - mean2_n - variance_n,
            -_dot(at.plogp_nV, dda_nV)
            - at.entropy_n * mean2_n
            - (1 + at.entropy_n) * variance_n
            - _dot(at.plogp_nV * d_nV, d_nV),
        )

    tensors = (hidden_TD, dhidden_TD, ddhidden_TD, target_T)
    return _by_chunk(chunk, tensors, readout, most=9)


class _Softmax(NamedTuple):
    """The distribution of every token; da/du and d2a/du2 where the scores are not linear in u."""

    logp_nV: Tensor
    p_nV: Tensor
    plogp_nV: Tensor
    entropy_n: Tensor
    slope: Tensor | float
    bend_nV: Tensor | None


def _softmax(hidden_nD: Tensor, readout: Readout) -> _Softmax:
    scores_nV = _product(hidden_nD, readout)
    if readout.bias_V is not None:
        scores_nV = scores_nV + readout.bias_V
    slope: Tensor | float = 1 / readout.temperature
    bend_nV = None
    if readout.softcap is not None:
        tanh_nV = torch.tanh(scores_nV / readout.softcap)
        scores_nV = readout.softcap * tanh_nV
        slope = (1 - tanh_nV.square()) / readout.temperature
        bend_nV = -2 / readout.softcap * tanh_nV * slope
    logp_nV = torch.log_softmax(_scaled(scores_nV, 1 / readout.temperature), -1)
    del scores_nV
    p_nV = logp_nV.exp()
    plogp_nV = p_nV * logp_nV
    return _Softmax(logp_nV, p_nV, plogp_nV, -plogp_nV.sum(-1), slope, bend_nV)


def _product(hidden_nD: Tensor, readout: Readout) -> Tensor:
    """W z, in float32 at least."""
    out_nV = linear(hidden_nD.to(readout.weight_VD.dtype), readout.weight_VD)
    return out_nV.to(torch.promote_types(out_nV.dtype, torch.float32))


def _scaled(x: Tensor, factor: Tensor | float) -> Tensor:
    return x if isinstance(factor, float) and factor == 1 else x * factor


def _dot(a_nV: Tensor, b_nV: Tensor) -> Tensor:
    """sum_v a b."""
    out_n: Tensor = torch.linalg.vecdot(a_nV, b_nV)
    return out_n


def _entry(x_nV: Tensor, target_n: Tensor) -> Tensor:
    return x_nV.gather(-1, target_n[:, None])[:, 0]


def _row(weight_nV: Tensor, at: _Softmax, readout: Readout) -> Tensor:
    """d/dz of sum_v w_v a_v, the w held fixed."""
    if not isinstance(at.slope, float):
        return (weight_nV * at.slope).to(readout.weight_VD.dtype) @ readout.weight_VD
    return _scaled(weight_nV.to(readout.weight_VD.dtype) @ readout.weight_VD, at.slope)


def _target_row(at: _Softmax, target_n: Tensor, readout: Readout) -> Tensor:
    """da_y/dz."""
    row_nD = readout.weight_VD[target_n]
    if not isinstance(at.slope, float):
        return _entry(at.slope, target_n)[:, None].to(row_nD) * row_nD
    return _scaled(row_nD, at.slope)


def _by_chunk(
    chunk: Callable[..., tuple[Tensor, ...]], of_T: tuple[Tensor, ...], readout: Readout, most: int
) -> tuple[Tensor, ...]:
    """chunk() of runs of tokens, joined; `most` [n, V] tensors exist at a time, with a cap 3 more."""
    most += 3 * (readout.softcap is not None)
    width = torch.finfo(torch.promote_types(readout.weight_VD.dtype, torch.float32)).bits // 8
    size = BYTES // (most * width * readout.weight_VD.shape[0])
    size = max(1, min(MOST, size))
    outs = [chunk(*parts) for parts in zip(*(x_T.split(size) for x_T in of_T), strict=True)]
    return tuple(torch.cat(column) for column in zip(*outs, strict=True))
