"""Products of groups of rows with a matrix each, as mixtures of experts take them, with derivatives."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .replaced import Replaced


class GroupedProducts(Replaced):
    """While active, a grouped product is one product per group.

    torch 2.13's grouped_mm has neither forward mode nor float64; the values are the same, to rounding.
    """

    def __init__(self) -> None:
        every = (getattr(owner, name, None) for owner in (torch, functional) for name in NAMES)
        super().__init__({f: _grouped_mm for f in every if f is not None})


NAMES = ("_grouped_mm", "grouped_mm")


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, *, offs: Tensor | None = None, **more: Any) -> Tensor:
    """Rows offs[i - 1] to offs[i] of x times w[i]; zeros for the rows after the last group."""
    if (
        offs is None
        or mat_a.dim() != 2
        or mat_b.dim() != 3
        or any(x is not None for x in more.values())
    ):
        return torch._grouped_mm(mat_a, mat_b, offs=offs, **more)
    ends = [0, *offs.tolist()]
    parts = [
        # As a linear layer, which forward mode computes without tangents of the frozen weight.
        functional.linear(mat_a[start:end], weight.mT)
        for start, end, weight in zip(ends[:-1], ends[1:], mat_b.unbind(), strict=True)
        if start < end
    ]
    out = torch.cat(parts) if parts else mat_a.new_zeros(0, mat_b.shape[-1])
    return functional.pad(out, (0, 0, 0, len(mat_a) - ends[-1])) if ends[-1] < len(mat_a) else out
