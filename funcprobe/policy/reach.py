"""How far back attention sees: sliding windows and chunks, as restrictions of a packed row's blocks."""

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from .placement import twin_of
from .rows import Block, Packing

# layer_types of transformers' configurations, and the field with the number of tokens.
SIZE = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


class Reach(NamedTuple):
    """Which of the earlier tokens a query sees, by the positions q >= k in their sequence.

    None sees all of them. The conventions are those of transformers.masking_utils (5.23), where a
    window includes the query's own token.
    """

    window: int | None = None  # seen: k > q - window
    chunk: int | None = None  # seen: k // chunk == q // chunk

    def all_up_to(self, position: int) -> bool:
        """Whether a query at this position, and so each before it, sees all that is before it."""
        return all(size is None or position < size for size in self)

    def sees(self, query: Int[Tensor, "*a"], key: Int[Tensor, "*b"]) -> Bool[Tensor, "*c"]:
        """Of positions that broadcast; earlier keys are a mask's own matter."""
        seen = torch.ones_like(query - key, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.chunk is not None:
            seen = seen & (key // self.chunk == query // self.chunk)
        return seen


def reaches(config: Any) -> dict[str, Reach]:
    """{type of layer: its reach}; a configuration without types has one for all layers.

    Raises KeyError for a type that is not attention to earlier tokens.
    """
    config, size = text_config(config), limits(config)
    window, chunk = size.get("sliding_window"), size.get("attention_chunk_size")
    of = dict(zip(SIZE, (Reach(), Reach(window), Reach(chunk=chunk)), strict=True))
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    return {kind: of[kind] for kind in kinds} or {"": Reach(window, chunk)}


def limits(config: Any) -> dict[str, int]:
    """{field of a configuration: tokens}, of windows and chunks that are set."""
    sizes = {name: getattr(text_config(config), name, None) for name in SIZE.values() if name}
    return {name: size for name, size in sizes.items() if size is not None}


def text_config(config: Any) -> Any:
    """The configuration of the language model, which is nested in that of a multimodal one."""
    return getattr(config, "get_text_config", lambda: config)()


def shortened(backbone: nn.Module, size: int) -> nn.Module:
    """The same module with windows and chunks of `size` tokens, which few tokens are enough to try.

    transformers (5.23) makes masks at every call from the configuration of the backbone; what its
    layers noted of it is for kernels that are not used here.
    """
    twin, config = twin_of(backbone), copy.deepcopy(backbone.config)
    text_config(config).update(dict.fromkeys(limits(config), size))
    vars(twin)["config"] = config
    return twin


def within(packing: Packing, reach: Reach) -> Packing:
    """The same packing where every token sees only what is in reach of it.

    Blocks of tokens that reach all before them stay as they are, and so do their faster kernels.
    """
    position_S = packing.position_1S[0]
    return packing._replace(blocks=tuple(_within(b, position_S, reach) for b in packing.blocks))


def _within(block: Block, position_S: Tensor, reach: Reach) -> Block:
    n, width = block.shape
    query_nQ = block.query_nQ
    if query_nQ is None:
        query_nQ = (block.start + torch.arange(n * width)).view(n, width)
    at_nQ = position_S[query_nQ]
    if reach.all_up_to(int(at_nQ.max())):
        return block
    at_nK = at_nQ if block.key_nK is None else position_S[block.key_nK]
    mask_n1QK = block.mask_n1QK
    if mask_n1QK is None:
        mask_n1QK = torch.ones(width, width, dtype=torch.bool).tril()[None, None]
    # No query is left without a key, its own, which padding has as well.
    seen_nQK = reach.sees(at_nQ[:, :, None], at_nK[:, None])
    return block._replace(mask_n1QK=mask_n1QK & seen_nQK[:, None])
