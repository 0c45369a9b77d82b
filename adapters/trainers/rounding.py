"""Warnings where the trained model is in half precision, whose rounding exceeds what is measured."""

import warnings

import torch

from funcprobe.types import Params


def is_half(dtype: torch.dtype) -> bool:
    """Whether a floating type has fewer than 32 bits."""
    return torch.finfo(dtype).bits < 32


def warn_of_rounding(params: Params, coarsest: torch.dtype) -> None:
    """One line for a model that computes in half precision, one for parameters that are."""
    if is_half(coarsest):
        warnings.warn(
            f"funcprobe: the model computes in {coarsest}, where rounding exceeds most measured "
            "changes: funcprobe/measured and funcprobe/ratio are omitted",
            stacklevel=2,
        )
    if rounded := [n for n, t in params.items() if is_half(t.dtype)]:
        warnings.warn(
            f"funcprobe: {len(rounded)} trainable tensors are in half precision, as {rounded[0]}: each "
            "step rounds them, so that the step taken differs from the predicted one",
            stacklevel=2,
        )
