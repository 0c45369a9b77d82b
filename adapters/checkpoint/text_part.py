"""Models that also read images: which parameters a text passes through."""

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


def require_text_adapter(model: nn.Module, source: str) -> None:
    """InputError for an adapter that also changes what reads images."""
    if outside := outside_text(model):
        total = sum(p.requires_grad for p in model.parameters())
        raise InputError(
            f"adapter {source}: {len(outside)} of its {total} tensors change what the model does with "
            f"images, as {outside[0]}: prompts and responses are text here, which does not reach them; "
            "give an adapter of the text part alone"
        )
