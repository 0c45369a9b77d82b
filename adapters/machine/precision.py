"""The named precisions: which numbers a policy is held in, and how they are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch

from funcprobe.policy.forward import Forward

Precision: TypeAlias = Literal["fast", "standard", "reference"]
DTYPES = {"fast": "float32", "standard": "float32", "reference": "float64"}


def dtype_of(table: dict[str, Any]) -> dict[str, Any]:
    """The policy's table with the dtype that its precision stands for; ValueError for another one."""
    expected = DTYPES.get(str(table.get("precision")))
    if expected is None:
        return table
    found = table.get("dtype", expected)
    if found != expected:
        raise ValueError(
            f'precision = "{table["precision"]}" is dtype = "{expected}", found "{found}": set one'
        )
    return table | {"dtype": expected}


@contextmanager
def products(precision: Precision | None) -> Iterator[None]:
    """While it is open, this process multiplies float32 matrices as the precision says, then as before.

    "fast": operands rounded to bfloat16 (TF32 on a GPU), sums and results in float32, where the
    processor has instructions for it. Numbers are held, added and differentiated in float32.
    """
    if precision != "fast":
        yield
        return
    # Of each its own name for it; what was set comes back.
    backends = ((torch.backends.mkldnn.matmul, "bf16"), (torch.backends.cuda.matmul, "tf32"))  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend, _ in backends]
    try:
        for backend, reduced in backends:
            backend.fp32_precision = reduced
        yield
    finally:
        for (backend, _), setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


def rounded(forward: Forward, precision: Precision | None) -> Forward:
    """The forward with the precision that its products have: checks and warnings follow it."""
    return forward._replace(coarsest=torch.bfloat16) if precision == "fast" else forward
