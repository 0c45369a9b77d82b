"""The named precisions: dtype of the policy, and precision of its matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch

from funcprobe.policy.forward import Forward

from .memory import room_for_scores

Precision: TypeAlias = Literal["fast", "standard", "reference"]
DTYPES = {"fast": "float32", "standard": "float32", "reference": "float64"}


def dtype_of(table: dict[str, Any]) -> dict[str, Any]:
    """The [policy] table with the dtype that its precision implies; ValueError if it sets another."""
    expected = DTYPES.get(str(table.get("precision")))
    if expected is None:
        return table
    found = table.get("dtype", expected)
    if found != expected:
        raise ValueError(
            f'precision = "{table["precision"]}" implies dtype = "{expected}", found "{found}": set '
            "one of the two"
        )
    return table | {"dtype": expected}


@contextmanager
def products(precision: Precision | None) -> Iterator[None]:
    """Inside this context the process multiplies float32 matrices at `precision`; restored at its end.

    "fast": operands rounded to bfloat16 (TF32 on a GPU), sums and results in float32, if the processor
    has instructions for it. Everything else is stored and computed in float32.
    """
    if precision != "fast":
        yield
        return
    # Each backend has its own name for it; the previous settings are restored.
    backends = ((torch.backends.mkldnn.matmul, "bf16"), (torch.backends.cuda.matmul, "tf32"))  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend, _ in backends]
    try:
        for backend, reduced in backends:
            backend.fp32_precision = reduced
        yield
    finally:
        for (backend, _), setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


def of_machine(forward: Forward, precision: Precision | None) -> Forward:
    """The forward as this machine computes it: its products' precision, its head's chunks of tokens."""
    forward, readout = rounded(forward, precision), forward.readout
    if readout is None or (room := room_for_scores(readout.weight_VD.device)) is None:
        return forward
    return forward._replace(readout=readout._replace(room=room))


def rounded(forward: Forward, precision: Precision | None) -> Forward:
    """The forward with the precision of its products as `coarsest`, which checks and warnings use."""
    return forward._replace(coarsest=torch.bfloat16) if precision == "fast" else forward
