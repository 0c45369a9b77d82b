"""How far back attention sees: sliding windows and chunks."""

import copy
from typing import Any

from torch import nn

from .blocks import Reach
from .placement import twin_of

# layer_types of transformers' configurations, and the field with the number of tokens.
SIZE = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


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
