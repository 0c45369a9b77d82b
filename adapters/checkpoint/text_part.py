"""Models that also read images: which parameters a text passes through."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from funcprobe.policy.suitability import causal_lm
from funcprobe.types import InputError


def outside_text(model: nn.Module) -> list[str]:
    """Names of trainable parameters that no text reaches, as those of a vision tower.

    None for a model of text alone.
    """
    base: Any = causal_lm(model)
    if base.config.get_text_config() is base.config:
        return []
    parts = (base.get_decoder(), base.get_output_embeddings())
    reached = {id(p) for part in parts for p in part.parameters()}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in reached]


def train_text(model: nn.Module) -> None:
    """Make the parameters that a text passes through trainable, and no other ones."""
    model.requires_grad_(True)
    unreached = set(outside_text(model))
    for name, p in model.named_parameters():
        p.requires_grad_(name not in unreached)


def require_names_of_parts(base: Any, names: Iterable[str], source: str) -> None:
    """InputError for the adapter of a model that is the text part of this base alone."""
    if base.config.get_text_config() is base.config:
        return
    path = next(name for name, module in base.named_modules() if module is base.get_decoder())
    if not any(f".{path}." in name or "vision" in name or "visual" in name for name in names):
        raise InputError(
            f"adapter {source}: the base also reads images, and the adapter was trained on its text "
            f"part as a model of its own (no name has {path}): save that part with save_pretrained, "
            "and set policy.base to it"
        )


def require_text_adapter(model: nn.Module, source: str) -> None:
    """InputError for an adapter that also changes what reads images."""
    if outside := outside_text(model):
        total = sum(p.requires_grad for p in model.parameters())
        raise InputError(
            f"adapter {source}: {len(outside)} of its {total} tensors change what the model does with "
            f"images, as {outside[0]}: prompts and responses are text here, which does not reach them; "
            "give an adapter of the text part alone"
        )
