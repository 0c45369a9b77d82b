"""Attention within a packed row: each block attends within itself, in one kernel call if it can."""

from collections.abc import Callable
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..autodiff.replaced import Replaced
from .blocks import Block, Packing


class NotPackedError(RuntimeError):
    """The model does not call attention in the way that packed rows need."""


class PackedAttention(Replaced):
    """Every scaled_dot_product_attention over a packed row becomes one call per block, or span of it.

    The model receives the row as one sequence, with explicit positions and a placeholder mask
    (`no_mask`), whose index says by which of `packings` a layer attends: a window's differs from that
    of whole sequences in what a token sees, and in nothing else. Rotary embeddings, norms and linear
    layers act on each token separately, so that only the pairs of tokens that attend have to be
    corrected. All operations remain ordinary torch functions, visible to other modes and to transforms.
    """

    def __init__(self, *packings: Packing) -> None:
        # A split model attends on several devices.
        at = cache(lambda index, device: packings[index].to(device))
        super().__init__({scaled_dot_product_attention: partial(_attend, len(packings), at)})


class OwnHeads(Replaced):
    """Every scaled_dot_product_attention in float32 off the CPU gets a key and a value for each head.

    CUDA's fused kernel for float32 takes no groups of heads in torch 2.9 and some later ones: asked for
    them, torch falls back to one that holds all scores, in a gradient those of every layer.
    """

    def __init__(self) -> None:
        super().__init__({scaled_dot_product_attention: _own_heads})


def no_mask(device: torch.device, index: int = 0) -> Float[Tensor, "1 1 1 m"]:
    """A placeholder: transformers passes a mask of four dimensions on to attention unchanged.

    Its index is m - 1, as reading a value would stop the device, and copies lose an object's identity.
    """
    return torch.zeros(1, 1, 1, index + 1, device=device)


def _attend(
    count: int,
    packing_at: Callable[[int, torch.device], Packing],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "1 H S d"]:
    # Any other mask shows that the model built its own instead of passing on no_mask()'s.
    masks = [(1, 1, 1, index + 1) for index in range(count)]
    if dropout_p or is_causal or attn_mask is None or attn_mask.shape not in masks:
        raise NotPackedError("its attention builds its own masks")
    packing = packing_at(masks.index(attn_mask.shape), query.device)
    query_SHd, key_SHd, value_SHd = (x[0].transpose(0, 1) for x in (query, key, value))
    outs = []
    for block in packing.blocks:
        out_nHQd = _attend_in(
            block,
            _queries(query_SHd, block),
            _keys(key_SHd, block),
            _keys(value_SHd, block),
            partial(scaled_dot_product_attention, scale=scale, enable_gqa=enable_gqa),
        )
        outs.append(out_nHQd.transpose(1, 2).flatten(0, 1))
    out_SHd = outs[0] if len(outs) == 1 else torch.cat(outs)
    if packing.place_S is not None:
        out_SHd = out_SHd.index_select(0, packing.place_S)
    return out_SHd.transpose(0, 1)[None]


def _attend_in(
    block: Block, query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Tensor]
) -> Float[Tensor, "n H Q d"]:
    if block.seen is None:
        return attend(query, key, value, is_causal=True)
    outs = [
        attend(
            query[:, :, queries],
            key[:, :, keys],
            value[:, :, keys],
            attn_mask=block.seen.mask(queries, keys),
        )
        for queries, keys in block.seen.spans
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _own_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and query.dtype == torch.float32 and query.device.type != "cpu":
        each, enable_gqa = query.shape[-3] // key.shape[-3], False
        key, value = (x.repeat_interleave(each, -3) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _queries(x_SHd: Tensor, block: Block) -> Float[Tensor, "n H Q d"]:
    n, width = block.shape
    if block.query_nQ is None:
        rows_nHd = x_SHd[block.start : block.start + n * width]
    else:
        rows_nHd = x_SHd.index_select(0, block.query_nQ.flatten())
    return rows_nHd.view(n, width, *x_SHd.shape[1:]).transpose(1, 2)


def _keys(x_SHd: Tensor, block: Block) -> Float[Tensor, "n H K d"]:
    if block.key_nK is None:
        return _queries(x_SHd, block)
    rows_nHd = x_SHd.index_select(0, block.key_nK.flatten())
    return rows_nHd.view(*block.key_nK.shape, *x_SHd.shape[1:]).transpose(1, 2)
