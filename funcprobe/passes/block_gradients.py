"""A gradient as a sum over blocks of sequences, with the products of each block's along directions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import tree
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS, select
from ..types import Batch, Params
from .gradients import accumulate, weighted_grad, zero_gradient


class Blocks(NamedTuple):
    """Blocks of sequences, and <gradient of block b restricted to a tensor, direction>, float64."""

    block_N: Int[Tensor, " N"]  # of every sequence, 0 to K - 1
    dot_KTd: Float[Tensor, "K T d"]  # T: tensors by sorted name, d: directions


def block_gradients(
    params: Params,
    batch: Batch,
    p_NR: Float[Tensor, "N R"],
    q_NR: Float[Tensor, "N R"],
    block_N: Int[Tensor, " N"],
    directions: Sequence[Params],
    forward: Forward,
    max_tokens: int = MAX_TOKENS,
) -> tuple[Params, Blocks]:
    """`weighted_grad` of sum_ik (p_ik l_ik + q_ik h_ik), and the products of its blocks' gradients.

    One pass: every sequence is in one block, `block_N` of 0 to K - 1, and one block's gradient is held
    at a time. Microbatches do not cross blocks, so that prompts are shared within a block alone.
    Raises ValueError for a block without sequences, as for a direction with other names or shapes than
    `params`, and InputError where `weighted_grad` does.
    """
    blocks = int(block_N.max()) + 1
    if len(block_N.unique()) != blocks or int(block_N.min()) < 0:
        raise ValueError(
            f"block_N has {len(block_N.unique())} different entries, not 0 to {blocks - 1}"
        )
    total, dots = tree.zeros(zero_gradient(params)), []
    for b in range(blocks):
        index_n = (block_N == b).nonzero().flatten()
        part = (select(batch, index_n), p_NR[index_n], q_NR[index_n])
        X_b = weighted_grad(params, *part, forward, max_tokens)
        dots.append([list(tree.dot_by_name(X_b, v).values()) for v in directions])
        total = accumulate(total, X_b)
    shape = (blocks, len(directions), len(params))
    dot_KdT = torch.tensor(dots, dtype=torch.float64).reshape(shape)
    return total, Blocks(block_N, dot_KdT.transpose(1, 2).contiguous())
