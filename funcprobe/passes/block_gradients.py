"""A gradient as a sum over blocks of sequences, with the products of each block's along directions."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import tree
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS, select
from ..progress import Kept, SoFar, alike
from ..ranks import Ranks
from ..types import Batch, Params
from .gradients import accumulate, weighted_grad, zero_gradient
from .microbatches import own_microbatches, replayed


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
    K, names = int(block_N.max()) + 1, sorted(params)
    if len(block_N.unique()) != K or int(block_N.min()) < 0:
        raise ValueError(f"block_N has {len(block_N.unique())} different entries, not 0 to {K - 1}")
    total = zero_gradient(params)
    dot_KdT = torch.zeros(K, len(directions), len(names), dtype=torch.float64)

    def fits(so_far: SoFar) -> bool:
        block, *counts = so_far.counts or (K,)
        zeros = [total[n] for n in names]
        if not (0 <= block < K and alike(so_far.tensors, [dot_KdT, *zeros, *zeros])):
            return False
        part = select(batch, (block_N == block).nonzero().flatten())
        waiting = own_microbatches(part, max_tokens, forward.layout, forward.ranks)
        return replayed(counts, waiting, part, forward.layout, repeats=True) is not None

    plan = (max_tokens, int(forward.recompute), *block_N.tolist())
    kept = forward.progress.begin(plan, fits)
    first, of_first = 0, None
    if kept.so_far is not None:
        (first, *counts), (dot_KdT, *both) = kept.so_far
        sums, inner = both[: len(names)], both[len(names) :]
        total = {n: x.to(total[n].device) for n, x in zip(names, sums, strict=True)}
        of_first = SoFar(tuple(counts), inner)
    furthest, (dot_KdT, *sums) = _of_furthest(
        first, [dot_KdT, *(total[n] for n in names)], forward.ranks
    )
    of_first = of_first if furthest == first else None
    first, total = furthest, dict(zip(names, sums, strict=True))
    for b in range(first, K):
        index_n = (block_N == b).nonzero().flatten()
        part = (select(batch, index_n), p_NR[index_n], q_NR[index_n])
        before = [dot_KdT, *(total[n] for n in names)]
        within = _OfBlock(kept, b, before, of_first if b == first else None)
        X_b = weighted_grad(params, *part, forward._replace(progress=within), max_tokens)
        dots = [list(tree.dot_by_name(X_b, v).values()) for v in directions]
        dot_dT = torch.tensor(dots, dtype=torch.float64).reshape(dot_KdT.shape[1:])
        dot_KdT = dot_KdT.index_copy(0, torch.tensor([b]), dot_dT[None])
        total = accumulate(total, X_b)
    return total, Blocks(block_N, dot_KdT.transpose(1, 2).contiguous())


def _of_furthest(block: int, before: list[Tensor], ranks: Ranks) -> tuple[int, list[Tensor]]:
    """The latest block that a rank had begun, and what the blocks before it gave.

    Each rank keeps in its own time, so that they may have ended in different blocks; the sum of whole
    blocks is the same on all of them, and the furthest one gives it.
    """
    if ranks.size == 1:
        return block, before
    own_R = torch.arange(ranks.size) == ranks.rank
    (block_R,) = ranks.add([own_R * block])
    furthest = int(block_R.max())
    if furthest == int(block_R.min()):
        return block, before
    gives = int(block_R.argmax()) == ranks.rank
    return furthest, ranks.add([x if gives else torch.zeros_like(x) for x in before])


class _OfBlock(NamedTuple):
    """What is kept of a block's gradient, together with what the blocks before it gave."""

    kept: Kept
    block: int
    before: list[Tensor]
    so_far: SoFar | None

    def begin(self, plan: Sequence[int], fits: Callable[[SoFar], bool]) -> Kept:  # noqa: ARG002
        return self

    def keep(self, counts: Sequence[int], tensors: Callable[[], Sequence[Tensor]]) -> None:
        self.kept.keep((self.block, *counts), lambda: [*self.before, *tensors()])
