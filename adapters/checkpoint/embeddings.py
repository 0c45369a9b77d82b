"""Embeddings in an adapter's file: those of a vocabulary that was resized in training, or a copy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft import LoraConfig
from torch import Tensor, nn

from funcprobe.types import InputError

_PREFIX = "base_model.model."  # of every name in an adapter's file


class _Embedding(NamedTuple):
    """The input or the output embedding: its path in the base, and its rows in the file."""

    name: str
    module: nn.Module
    saved: dict[str, nn.Parameter]  # key in the file -> the base's parameter
    missing: list[str]  # its parameters that the file lacks
    rows: set[int]  # of its tensors in the file, those of its adapter included


def fit_vocabulary(
    base: Any, weights: Mapping[str, Tensor], adapter_config: LoraConfig, source: str
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Give the base the rows that it had in training; {key: parameter} of the embeddings in the file.

    The values are the caller's to copy: an initialisation may change the base in between. Also returns
    a line if the vocabulary was resized. InputError if it was, and the file lacks an embedding.
    """
    found = _embeddings(base, weights)
    rows = {count for e in found for count in e.rows}
    now = int(base.get_input_embeddings().weight.shape[0])
    resized = f"adapter {source}: the vocabulary was resized in training"
    lines = []
    if rows - {now}:
        if len(rows) > 1:
            counts = " and ".join(map(str, sorted(rows)))
            raise InputError(f"{resized} to {counts} rows, one number is expected: copy the file again")
        new = rows.pop()
        tied = len({id(e.module.weight) for e in found}) < len(found)
        lacking = [name for e in found for name in e.missing]
        if lacking and not (tied and any(e.saved for e in found)):
            raise InputError(
                f"{resized} from {now} to {new} rows, but the file lacks the resized {lacking[0]}: "
                "save the adapter with save_embedding_layers=True, or set policy.base to the resized "
                "model"
            )
        base.resize_token_embeddings(new, mean_resizing=False)
        lines.append(f"the vocabulary was resized in training from {now} to {new} rows, and is here")
        found, now = _embeddings(base, weights), new
    _require_rows(adapter_config, now, resized)
    return {key: p for e in found for key, p in e.saved.items()}, lines


def _embeddings(base: Any, weights: Mapping[str, Tensor]) -> list[_Embedding]:
    path = {id(module): name for name, module in base.named_modules()}
    found = []
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        name = path[id(module)]
        saved, missing = {}, []
        for part, parameter in module.named_parameters():
            keys = (f"{_PREFIX}{name}.{part}", f"{_PREFIX}{name}.base_layer.{part}")
            key = next((key for key in keys if key in weights), None)
            if key is None:
                missing.append(f"{name}.{part}")
            else:
                saved[key] = parameter
        rows = {int(weights[key].shape[0]) for key in saved}
        # The factors of an adapter on it, which have the vocabulary as one of their sides.
        for factor, side in (("lora_embedding_A", 1), ("lora_B.weight", 0)):
            if (tensor := weights.get(f"{_PREFIX}{name}.{factor}")) is not None and tensor.ndim == 2:
                rows.add(int(tensor.shape[side]))
        found.append(_Embedding(name, module, saved, missing, rows))
    return found


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
