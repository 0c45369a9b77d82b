"""Groups that trainers give their optimizer, replayed on a model: names in the order of positions."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from funcprobe.types import Params

_SAVED = "modules_to_save.default.weight"  # the end of a name of peft's
_UNDECAYED = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")


class Grouping(NamedTuple):
    """Names of each group's parameters; the groups in `undecayed` are saved with weight decay 0."""

    what: str
    groups: list[list[str]]
    undecayed: tuple[int, ...] = ()


def groupings(model: torch.nn.Module, params: Params, decay: set[str]) -> list[Grouping]:
    """The known ones, the most common first. `decay` are the names that the Trainer's rule decays.

    Read in the sources of transformers 5.23, peft 0.21, verl 0.9, Unsloth
    (`_create_unsloth_optimizer`), LLaMA-Factory (`_create_loraplus_optimizer`), axolotl
    (`create_optimizer_grouped_parameters`), and OpenRLHF (`get_optimizer_grouped_parameters`).
    """
    everything = [name for name, _ in model.named_parameters()]
    order = [name for name in everything if name in params]
    rank = {name: p.ndim for name, p in model.named_parameters()}

    def decayed(name: str) -> bool:
        return name in decay

    def named_so(name: str) -> bool:
        return not any(part in name for part in _UNDECAYED)

    return [
        Grouping("the Trainer's [decay, no-decay] grouping replayed", _halves(order, decayed), (1,)),
        Grouping("one group in named_parameters() order", [order]),
        Grouping("peft's LoRA+ groups replayed", _lora_plus(order, rank, model), (3,)),
        Grouping("LLaMA-Factory's LoRA+ groups replayed", _factory_lora_plus(order, rank, model), (2,)),
        Grouping(
            "Unsloth's groups, all but modules_to_save and these, replayed",
            _halves(order, lambda name: not name.endswith(_SAVED)),
        ),
        _axolotl(order, decay),
        Grouping("OpenRLHF's [decay, no-decay] groups replayed", _halves(order, named_so), (1,)),
        Grouping("[matrices, vectors] groups", _halves(order, lambda name: rank[name] >= 2), (1,)),
        Grouping("one group of all in named_parameters() order", [everything]),
        Grouping("all parameters in [decay, no-decay] groups", _halves(everything, decayed), (1,)),
    ]


def _halves(names: Iterable[str], first: Callable[[str], bool]) -> list[list[str]]:
    names = list(names)
    return [[n for n in names if first(n)], [n for n in names if not first(n)]]


def _lora_plus(order: list[str], rank: dict[str, int], model: torch.nn.Module) -> list[list[str]]:
    """[A, embeddings, B, B without decay], as peft.optimizers.create_loraplus_optimizer orders."""
    kinds = _lora_kinds(order, rank, model, "lora_embedding")
    return [kinds[kind] for kind in ("A", "embedding", "B", "B without decay")]


def _factory_lora_plus(
    order: list[str], rank: dict[str, int], model: torch.nn.Module
) -> list[list[str]]:
    """[A, B, B without decay, embeddings], where the embeddings are their B alone."""
    kinds = _lora_kinds(order, rank, model, "lora_embedding_B")
    return [kinds[kind] for kind in ("A", "B", "B without decay", "embedding")]


def _lora_kinds(
    order: list[str], rank: dict[str, int], model: torch.nn.Module, embedding: str
) -> dict[str, list[str]]:
    """Weight decay does not follow the Trainer's rule: its name patterns are not used."""
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS  # slow to import
    from transformers.trainer_pt_utils import get_parameter_names

    decay = {n for n in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in n}
    kinds: dict[str, list[str]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for name in order:
        if embedding in name:
            kind = "embedding"
        elif "lora_B" in name or rank[name] == 1:
            kind = "B" if name in decay else "B without decay"
        else:
            kind = "A"
        kinds[kind].append(name)
    return kinds


def _axolotl(order: list[str], decay: set[str]) -> Grouping:
    """[decay, embeddings, no decay] with embedding_lr or embedding_lr_scale, without empty ones."""
    kinds: dict[str, list[str]] = {"decay": [], "embedding": [], "no decay": []}
    for name in order:
        embedding = name.endswith(_SAVED) or "embed_tokens" in name or "lm_head" in name
        kinds["embedding" if embedding else "decay" if name in decay else "no decay"].append(name)
    full = {kind: names for kind, names in kinds.items() if names}
    undecayed = tuple(i for i, kind in enumerate(full) if kind != "decay")
    return Grouping("axolotl's embedding_lr groups replayed", list(full.values()), undecayed)
