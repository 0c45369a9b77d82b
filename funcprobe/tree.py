"""Algebra on Params by name; ValueError for a missing name, an unexpected name or another shape."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import optree
import torch
from torch import Tensor

from .types import Params


def require_same(expected: Params, found: Params, what: str = "params") -> None:
    """Raise ValueError unless `found` has exactly the names and shapes of `expected`."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{what}: names do not match: missing {_some(missing)}, unexpected {_some(extra)}"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ValueError(
                f"{what}: {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
            )


def tree_map(f: Callable[..., Tensor], first: Params, *rest: Params) -> Params:
    """{name: f(first[name], rest[0][name], ...)}, names and shapes checked, keys sorted."""
    for other in rest:
        require_same(first, other)
    # optree visits dict keys in sorted order, but returns them in the order of the first tree.
    first = dict(sorted(first.items()))
    return cast(Params, optree.tree_map(f, cast(Any, first), *cast(Any, rest)))


def dot(a: Params, b: Params) -> float:
    """<a, b> = sum over names and entries of a * b, accumulated in float64."""
    return math.fsum(dot_by_name(a, b).values())


def dot_by_name(a: Params, b: Params) -> dict[str, float]:
    """{name: <a[name], b[name]>}, accumulated in float64 on the CPU."""
    require_same(a, b)
    return {name: float((f64(a[name]) * f64(b[name])).sum()) for name in sorted(a)}


def norm(a: Params) -> float:
    """Euclidean norm over all tensors, accumulated in float64."""
    return math.sqrt(dot(a, a))


def axpy(alpha: float, x: Params, y: Params) -> Params:
    """alpha * x + y, in y's dtype and on y's device (float64 inside, one rounding)."""

    def one(x: Tensor, y: Tensor) -> Tensor:
        return (f64(y) + alpha * f64(x)).to(dtype=y.dtype, device=y.device)

    return tree_map(one, x, y)


def scale(alpha: float, x: Params) -> Params:
    """alpha * x."""
    return tree_map(lambda t: alpha * t, x)


def add(a: Params, b: Params) -> Params:
    """a + b."""
    return tree_map(torch.add, a, b)


def mean(parts: Sequence[Params]) -> Params:
    """The mean of one or more, accumulated in float64, in the dtype of the first; one is itself."""
    if len(parts) == 1:
        return parts[0]

    def one(*tensors: Tensor) -> Tensor:
        return torch.stack([f64(t) for t in tensors]).mean(0).to(tensors[0].dtype)

    return tree_map(one, *parts)


def multiply(a: Params, b: Params) -> Params:
    """Entrywise a * b."""
    return tree_map(torch.mul, a, b)


def zeros(like: Params, dtype: torch.dtype | None = None) -> Params:
    """Zeros of the same names and shapes, on the CPU."""
    return tree_map(lambda t: torch.zeros(t.shape, dtype=dtype or t.dtype), like)


def f64(t: Tensor) -> Tensor:
    """A tensor's values in float64 on the CPU, where sums and statistics are computed."""
    return t.detach().to(device="cpu", dtype=torch.float64)


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "none"
