"""Errors over E of the shares of tensors, and of what they are grouped by: from blocks of E."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..passes.block_gradients import Blocks
from ..statistics.blocks import block_influence
from ..statistics.evaluation import Evaluation
from ..statistics.intervals import Error, delta_error
from .module_shares import factor_of, layer_of, module_of, projection_of


class PartErrors(NamedTuple):
    """Errors over E of `Parts` and of their sum."""

    momentum: Error
    decay: Error
    update: Error
    total: Error


class ModuleErrors(NamedTuple):
    """Errors given U of `ModuleShares`, by the same names, and of the batch's own two sums."""

    tensor: dict[str, PartErrors]
    module: dict[str, PartErrors]
    layer: dict[str, PartErrors]
    projection: dict[str, PartErrors]
    factor: dict[str, PartErrors]
    total: PartErrors
    marginal: Error  # of <X, D Y>, the sum of U's marginals
    difference: Error  # of <X, D Y> - <X, P Y>, marginals less shares
    influence: "BlockInfluence"


class BlockInfluence(NamedTuple):
    """Influence values of K blocks of E on <X, part> restricted to T tensors (`masked.StepParts`)."""

    names: tuple[str, ...]
    value_KTd: Float[Tensor, "K T d"]

    def of(self, names: Iterable[str]) -> Float[Tensor, "K d"]:
        """On the sum over some tensors."""
        chosen = set(names)
        index = [i for i, name in enumerate(self.names) if name in chosen]
        return self.value_KTd[:, index].sum(1)


def module_errors(at: Evaluation, blocks: Blocks, names: Iterable[str]) -> ModuleErrors:
    """Standard errors of <X, v> by tensor and part of v, from blocks of E's sampling units.

    With psi_b the influence value of block b of K (`statistics.blocks.block_influence`, which states
    what it leaves out), SE^2 = K / (K - 1) sum_b psi_b^2, in the unit of the shares; X, and so psi, is
    a sum over tensors, so that the error of any group of them is that of the sum. `blocks` has the
    products with the parts of `masked.StepParts`; `names` are those of the registry.
    """
    influence = BlockInfluence(
        tuple(sorted(names)), block_influence(at, blocks.dot_KTd, blocks.block_N)
    )

    def grouped(group_of: Callable[[str], str]) -> dict[str, PartErrors]:
        members: dict[str, list[str]] = {}
        for name in influence.names:
            members.setdefault(group_of(name), []).append(name)
        return {group: _errors(influence.of(inside)) for group, inside in members.items()}

    whole_Kd = influence.value_KTd.sum(1)
    return ModuleErrors(
        tensor={n: _errors(influence.value_KTd[:, i]) for i, n in enumerate(influence.names)},
        module=grouped(module_of),
        layer=grouped(layer_of),
        projection=grouped(projection_of),
        factor=grouped(factor_of),
        total=_errors(whole_Kd),
        marginal=block_error(whole_Kd[:, 3]),
        difference=block_error(whole_Kd[:, 3] - whole_Kd[:, 2]),
        influence=influence,
    )


def block_error(influence_K: Float[Tensor, " K"]) -> Error:
    """The delta method's error over K blocks, each a sampling unit."""
    return delta_error(influence_K, torch.arange(len(influence_K)))


def _errors(influence_Kd: Float[Tensor, "K d"]) -> PartErrors:
    momentum, decay, update, _ = influence_Kd.unbind(1)
    parts = (momentum, decay, update, momentum + decay + update)
    return PartErrors(*(block_error(part_K) for part_K in parts))
