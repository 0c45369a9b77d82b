"""The row of a padding token in a trained embedding, which torch gives no gradient.

nn.Embedding(padding_idx=i) drops row i from the gradient in reverse mode, and keeps it in forward mode
(torch 2.13). A derivative of the entropy needs it where the token occurs as text, as the end-of-turn
token of a chat does that also pads; the gradient of the trainer lacks it.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

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
    """The forward whose gradient is the trainer's: without the padding rows."""
    if not padding:
        return forward

    def hidden(given: Params, rows: Any) -> Tensor:
        with _restored(padding):
            return forward.hidden(given, rows)

    return forward._replace(hidden=hidden)


@contextmanager
def _restored(padding: Mapping[nn.Embedding, int]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, index in padding.items():
            module.padding_idx = index
            stack.callback(setattr, module, "padding_idx", None)
        yield
