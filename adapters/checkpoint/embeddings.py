"""Embeddings in an adapter's file: those of a vocabulary that was resized in training, or a copy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn

from funcprobe.types import InputError

_PREFIX = "base_model.model."  # of every name in an adapter's file


class SavedEmbeddings(NamedTuple):
    """What an adapter's file has of the embeddings besides the adapter's own tensors."""

    frozen: dict[str, nn.Parameter]  # key in the file -> the base's parameter, whose value it is
    copies: dict[str, str]  # key in the file -> key of the tensor of which it is a second copy
    lines: tuple[str, ...]


class _Embedding(NamedTuple):
    """The input or the output embedding: its path in the base, and its tensors in the file."""

    name: str
    module: nn.Module
    trained: bool  # as a whole, by modules_to_save: the base's own values are not used
    frozen: dict[str, nn.Parameter]
    copies: dict[str, str]
    missing: list[str]  # parameters whose frozen values the file lacks
    rows: set[int]  # of its tensors, those of an adapter on it included


def fit_vocabulary(
    base: Any, weights: Mapping[str, Tensor], adapter_config: LoraConfig, source: str
) -> SavedEmbeddings:
    """Give the base the rows that it had in training, and find the embeddings in the file.

    The values are the caller's to copy: an initialisation may change the base in between. InputError if
    the vocabulary was resized and the file lacks an embedding, or if two copies differ.
    """
    found = _embeddings(base, weights, adapter_config)
    rows = {count for e in found for count in e.rows}
    now = int(base.get_input_embeddings().weight.shape[0])
    resized = f"adapter {source}: the vocabulary was resized in training"
    lines = []
    if rows - {now}:
        if len(rows) > 1:
            counts = " and ".join(map(str, sorted(rows)))
            raise InputError(f"{resized} to {counts} rows, one number is expected: copy the file again")
        new = rows.pop()
        if lacking := _lacking(found, adapter_config):
            raise InputError(
                f"{resized} from {now} to {new} rows, but the file lacks the resized {lacking}: save "
                "the adapter with save_embedding_layers=True, or set policy.base to the resized model"
            )
        base.resize_token_embeddings(new, mean_resizing=False)
        lines.append(f"the vocabulary was resized in training from {now} to {new} rows, and is here")
        found, now = _embeddings(base, weights, adapter_config), new
    _require_rows(adapter_config, now, resized)
    copies = {key: other for e in found for key, other in e.copies.items()}
    for key, other in copies.items():
        if other not in weights or not _equal(weights[key], weights[other]):
            raise InputError(f"adapter {source}: {key} and {other} differ: copy the file again")
    return SavedEmbeddings({k: p for e in found for k, p in e.frozen.items()}, copies, tuple(lines))


def _embeddings(
    base: Any, weights: Mapping[str, Tensor], adapter_config: LoraConfig
) -> list[_Embedding]:
    path = {id(module): f"{_PREFIX}{name}" for name, module in base.named_modules()}
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    first = path[id(modules[0])]
    found = []
    for module in filter(None, modules):
        name = path[id(module)]
        saved = adapter_config.modules_to_save or ()
        trained = any(name.endswith(f".{suffix}") for suffix in saved)
        places = [".original_module"] if trained else ["", ".base_layer", ".token_adapter.base_layer"]
        frozen: dict[str, nn.Parameter] = {}
        copies: dict[str, str] = {}
        missing, rows = [], set()
        for part, parameter in module.named_parameters():
            keys = {f"{name}{place}.{part}" for place in places} & weights.keys()
            frozen |= dict.fromkeys(keys, parameter)
            missing += [] if keys else [f"{name.removeprefix(_PREFIX)}.{part}"]
            own, again = f"{name}.{part}", f"{name}.modules_to_save.{part}"
            copies |= {again: own} if again in weights else {}
            rows |= {int(weights[key].shape[0]) for key in keys | {own} if key in weights}
        # Of tied embeddings, peft saves the trained tokens twice.
        delta = "token_adapter.trainable_tokens_delta"
        if name != first and f"{name}.{delta}" in weights:
            copies[f"{name}.{delta}"] = f"{first}.{delta}"
        # The factors of an adapter on it, which have the vocabulary as one of their sides.
        for factor, side in (("lora_embedding_A", 1), ("lora_B.weight", 0)):
            if (tensor := weights.get(f"{name}.{factor}")) is not None and tensor.ndim == 2:
                rows.add(int(tensor.shape[side]))
        found.append(_Embedding(name, module, trained, frozen, copies, missing, rows))
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    """Also true of two on the meta device, which have no values."""
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))


def _lacking(found: list[_Embedding], adapter_config: LoraConfig) -> str | None:
    """A parameter that the forward needs and the file lacks; None if there is none."""
    tied = len({id(e.module.weight) for e in found}) < len(found)
    if tied and (
        any(e.frozen for e in found)
        or (adapter_config.ensure_weight_tying and any(e.trained for e in found))
    ):
        return None
    return next((name for e in found if not e.trained for name in e.missing), None)


def _require_rows(adapter_config: LoraConfig, rows: int, resized: str) -> None:
    """InputError for trained tokens that the base has no rows for."""
    given = adapter_config.trainable_token_indices or ()
    lists = given.values() if isinstance(given, dict) else [given]
    largest = max((int(i) for ids in lists for i in ids), default=-1)
    if largest >= rows:
        raise InputError(
            f"{resized}: trainable_token_indices has {largest}, the base has {rows} rows: save the "
            "adapter with save_embedding_layers=True, or set policy.base to the resized model"
        )
