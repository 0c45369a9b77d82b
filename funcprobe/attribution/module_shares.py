"""The prediction <X, v> by tensor, and by what the tensors belong to: exact, as a sum over entries."""

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from .. import tree
from ..step import adam
from ..types import AdamState, Params, Step


class Parts(NamedTuple):
    """<X, v> of some tensors, by the parts of v: momentum, weight decay, this batch's gradient."""

    momentum: float
    decay: float
    update: float

    @property
    def total(self) -> float:
        return self.momentum + self.decay + self.update


class ModuleShares(NamedTuple):
    """Parts of <X, v> by name; each grouping has the same total. Names in their natural order."""

    tensor: dict[str, Parts]  # of the registry
    module: dict[str, Parts]  # that holds the tensors, as model.layers.0.mlp.up_proj
    layer: dict[str, Parts]  # up to the first number, as model.layers.0; else the module
    projection: dict[str, Parts]  # last part of the module's name, over all layers, as up_proj
    factor: dict[str, Parts]  # A or B of LoRA; else lora_magnitude_vector, weight, bias
    total: Parts


# ".lora_A.default.weight", ".lora_embedding_B.default", ".lora_magnitude_vector.default.weight" of peft
LORA = re.compile(r"\.(lora_(?:embedding_)?(?P<factor>[AB])|lora_\w+)(?=\.|$)")


def module_shares(
    X: Params, params: Params, Y_masks: Sequence[Params], adam_state: AdamState, step: Step
) -> ModuleShares:
    """<X, v> restricted to every tensor, and to every module, layer, projection and factor of LoRA.

    v is the step from the gradient Y, or the mean of the steps from several masks' gradients, of
    `update_direction`; the parts are <X, v_momentum>, <X, v_decay> and <X, P Y>, in the unit of the
    prediction per unit of eta; `module_errors` has their errors. Raises as `update_direction`, and
    ValueError if X has other names or shapes than `params`.
    """
    tree.require_same(params, X, "X")
    directions = ((Y, adam.update_direction(params, Y, adam_state, **step._asdict())) for Y in Y_masks)
    each = [  # one direction at a time: each is four adapters large
        (
            tree.dot_by_name(X, one.momentum),
            tree.dot_by_name(X, one.decay),
            tree.dot_by_name(tree.multiply(one.scale, X), Y),
        )
        for Y, one in directions
    ]
    tensor = {
        name: Parts(*(fmean(parts[i][name] for parts in each) for i in range(3)))
        for name in sorted(X, key=_natural)
    }
    return ModuleShares(
        tensor,
        module=_grouped(tensor, module_of),
        layer=_grouped(tensor, layer_of),
        projection=_grouped(tensor, projection_of),
        factor=_grouped(tensor, factor_of),
        total=_summed(list(tensor.values())),
    )


def module_of(name: str) -> str:
    """The module that a tensor of the registry belongs to, without what peft puts around it."""
    lora = LORA.search(name)
    path = name[: lora.start()] if lora else name.rpartition(".")[0]
    return re.sub(r"\.(base_layer|modules_to_save(\.[^.]+)?)(?=\.|$)", "", path) or name


def layer_of(name: str) -> str:
    """The path up to its first number; the module's, if it has none."""
    numbered = re.match(r"(.*?\.)?\d+(?=\.)", name)
    return numbered[0] if numbered else module_of(name)


def projection_of(name: str) -> str:
    """The last part of the module's name."""
    return module_of(name).rpartition(".")[2]


def factor_of(name: str) -> str:
    """A or B; the name of LoRA's other tensors; else weight or bias."""
    lora = LORA.search(name)
    if lora is None:
        return name.rpartition(".")[2]
    return lora["factor"] or lora[1]


def _grouped(tensor: dict[str, Parts], group_of: Callable[[str], str]) -> dict[str, Parts]:
    groups: dict[str, list[Parts]] = {}
    for name, parts in tensor.items():
        groups.setdefault(group_of(name), []).append(parts)
    return {group: _summed(members) for group, members in groups.items()}


def _summed(members: Sequence[Parts]) -> Parts:
    return Parts(*(sum(part) for part in zip(*members, strict=True)))


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [(int(x), "") if x.isdecimal() else (-1, x) for x in re.split(r"(\d+)", name)]
