"""The row of a padding token in a trained embedding, which torch gives no gradient.

nn.Embedding(padding_idx=i) drops row i from the gradient in reverse mode, and keeps it in forward mode
(torch 2.13). A derivative of the entropy needs it where the token occurs as text, as the end-of-turn
token of a chat does that also pads; the gradient of the trainer lacks it, and so do its products with a
direction, by which the error over U is computed.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from funcprobe.autodiff.replaced import Replaced
from funcprobe.policy.forward import Forward
from funcprobe.types import Params


def drop_padding_rows(model: nn.Module) -> dict[nn.Embedding, int]:
    """Give every embedding the derivative of its whole table; the padding rows that it had."""
    found = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            found[module] = module.padding_idx
            module.padding_idx = None
    return found


def as_trained(forward: Forward, padding: Mapping[nn.Embedding, int]) -> Forward:
    """The forward whose derivatives, in both modes, are the trainer's: without the padding rows."""
    if not padding:
        return forward

    def hidden(given: Params, rows: Any) -> Tensor:
        with _restored(padding), Replaced({functional.embedding: _embedding}):
            return forward.hidden(given, rows)

    return forward._replace(hidden=hidden)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """torch.nn.functional.embedding, constant at padding_idx."""
    rows = functional.embedding(input, weight, padding_idx, *args, **kwargs)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx)[..., None], rows.detach(), rows)


@contextmanager
def _restored(padding: Mapping[nn.Embedding, int]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, index in padding.items():
            module.padding_idx = index
            stack.callback(setattr, module, "padding_idx", None)
        yield
