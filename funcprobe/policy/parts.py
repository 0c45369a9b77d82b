"""A causal language model in two parts: its backbone, and all that it does after that, the head."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..autodiff.grouped import GroupedProducts
from .attention import OwnHeads, PackedAttention, no_mask
from .blocks import Packing, placed, within
from .layers import exchanged, layered
from .parameter_lora import parameter_lora
from .placement import devices_of, twin_of
from .reach import reaches, shortened
from .suitability import causal_lm


class Backbone(nn.Module):
    """tokens_NL -> last hidden state, which the head reads; `size` as in `shortened`, if given."""

    def __init__(self, model: nn.Module, path: str, size: int | None = None) -> None:
        super().__init__()
        self.model, self.path, self.size = model, path, size

    def forward(self, tokens_NL: Tensor, packing: Packing | None) -> Tensor:
        own = causal_lm(self.model).get_submodule(self.path)
        if self.size is not None:
            own = shortened(own, self.size)
        own = layered(own)
        given: dict[str, Any] = {"input_ids": tokens_NL, "use_cache": False}
        with ExitStack() as stack:
            stack.enter_context(parameter_lora(own))
            if getattr(own.config, "_experts_implementation", None) == "grouped_mm":
                stack.enter_context(GroupedProducts())
            if packing is not None:
                device = tokens_NL.device
                kinds = reaches(own.config)
                packings = [within(packing, reach) for reach in kinds.values()]
                stack.enter_context(PackedAttention(*packings))
                masks = {kind: no_mask(device, index) for index, kind in enumerate(kinds)}
                given["position_ids"] = placed(packing.position_1S, device)
                # A model with layers of several types takes a mask for each.
                given["attention_mask"] = masks if len(masks) > 1 else masks.popitem()[1]
            elif any(device.type != "cpu" for device in devices_of(own)):
                stack.enter_context(OwnHeads())
            out = own(**given)
        hidden_NLD: Tensor = out.last_hidden_state
        return hidden_NLD


class Head(nn.Module):
    """hidden_TD -> logits_TV, by the model's own forward, whose backbone returns what is given.

    So its logits have what the model does to them: a scale, a softcap, a layer before the embedding.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return after_backbone(causal_lm(self.model), self.path, hidden_TD)


def backbones(model: nn.Module) -> list[str]:
    """Paths at which a causal model may have the module whose hidden state its head reads.

    Its base model; its decoder, where that is less (OPT); the part that has the input embedding, where
    neither goes by its name (Llama 4).
    """
    base = causal_lm(model)
    embedding = base.get_input_embeddings()
    found = [
        getattr(base, base.base_model_prefix, None),
        getattr(base, "get_decoder", lambda: None)(),
        *(part for part in base.children() if any(m is embedding for m in part.modules())),
    ]
    paths = [path for own in found for path, module in base.named_modules() if path and module is own]
    return list(dict.fromkeys(paths))


def after_backbone(
    base: Any, path: str, hidden_TD: Tensor, embedding: nn.Module | None = None
) -> Tensor:
    """Logits [T, V] of a causal model from hidden states, with another output embedding if given."""
    short = exchanged(base, path, _given(base.get_submodule(path), _Hidden([hidden_TD[None]])))
    if embedding is not None:
        own = base.get_output_embeddings()
        short = exchanged(short, next(n for n, m in base.named_modules() if m is own), embedding)
    tokens_1T = torch.zeros(1, len(hidden_TD), dtype=torch.long, device=hidden_TD.device)
    # The class's forward: the whole model may be compiled, or accelerate's hooks hold the model itself.
    logits_1TV: Tensor = type(base).forward(short, input_ids=tokens_1T, use_cache=False).logits
    return logits_1TV[0]


class _Hidden(tuple[Tensor]):
    """A backbone's output with nothing but hidden states."""

    __slots__ = ()

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:  # caches, attentions, logits of routers
        if name.startswith("__"):
            raise AttributeError(name)


def _given(module: nn.Module, output: Any) -> nn.Module:
    """The same module with another forward, which returns `output`; without hooks, which have run."""
    twin = twin_of(module)
    vars(twin).update(
        forward=lambda *_, **__: output,
        _forward_hooks={},
        _forward_pre_hooks={},
        _compiled_call_impl=None,
    )
    return twin
