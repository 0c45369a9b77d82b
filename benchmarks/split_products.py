"""Linear layers in one rounded product, or in three that together are nearly float32's.

With a = hi + lo, hi the operand rounded to what the unit multiplies (bfloat16 on a CPU, TF32 on a GPU):

    a b ~ hi hi + (hi lo + lo hi)

so that what is left out, lo lo and the rounding of lo, is of the square of the unit's precision: 2^-16
for bfloat16's 2^-8, 2^-22 for TF32's 2^-11. Sums are in float32 throughout. A frozen weight is split
once. For forwards without a graph: nothing here is differentiated.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from shapes import paired, ratio
from torch import Tensor
from torch.nn.functional import linear

from funcprobe import Batch, Probe
from funcprobe.adapters.machine.precision import products
from funcprobe.autodiff.replaced import Replaced

DROPPED = {"cpu": 16, "cuda": 13}  # of float32's bits, those that bfloat16 and TF32 do not have
KINDS = ("one product", "three products", "float32")


class Products(Replaced):
    """While active, linear layers and matrix products of float32 are the sum of one or of three.

    Operands are rounded here, too, which changes nothing where the unit does it and shows the errors
    where it does not.
    """

    def __init__(self, count: int) -> None:
        super().__init__({linear: self._linear, torch.mm: self._mm})
        self.three = count == 3
        self.of_weight: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float32:
            return linear(x, weight, bias)
        return self._sum(x, weight) if bias is None else self._sum(x, weight) + bias

    def _mm(self, a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        if a.dtype != torch.float32:
            return torch.mm(a, b, out=out)
        found = self._sum(a, b.T)
        return found if out is None else out.copy_(found)

    def _sum(self, x: Tensor, weight: Tensor) -> Tensor:
        high, low = halves(x)
        key = weight.data_ptr()
        if key not in self.of_weight:  # kept with its weight, so that no other takes its place
            self.of_weight[key] = (weight, *halves(weight.detach()))
        _, weight_high, weight_low = self.of_weight[key]
        whole = linear(high, weight_high)
        if not self.three:
            return whole
        return whole + (linear(high, weight_low) + linear(low, weight_high))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """(hi, lo): x and x - hi, each rounded to nearest in bfloat16 or TF32."""
    high = _rounded(x.contiguous())
    return high, _rounded(x - high)


def _rounded(x: Tensor) -> Tensor:
    drop = DROPPED[x.device.type]
    bits = x.view(torch.int32)
    return ((bits + (1 << (drop - 1))) & -(1 << drop)).view(torch.float32)


def compared(
    single: Probe, double: Probe, batch: Batch, repeat: int, device: str
) -> list[dict[str, str]]:
    """A row for each of KINDS: time in float32's, largest errors of a token, nats.

    Times of one product are those of `precision = "fast"`, without the rounding here.
    """
    modes = {"one product": Products(1), "three products": Products(3)}  # which keep halves of weights

    def forward(kind: str, mode: AbstractContextManager[Any]) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), products(None if kind == "float32" else "fast"), mode:
            return single.token_stats(single.params, batch)

    with torch.no_grad():
        exact = double.token_stats(double.params, batch)
    errors, calls = {}, dict[str, Callable[[], Any]]()
    for kind in KINDS:
        found = forward(kind, modes.get(kind, nullcontext()))
        errors[kind] = [float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)]
        timed = modes["three products"] if kind == "three products" else nullcontext()
        calls[kind] = partial(forward, kind, timed)
    times = paired(calls, repeat, device)
    return [
        {
            "linear layers in": kind,
            "time": str(ratio(times, kind, "float32")),
            "log-probability, error": f"{errors[kind][0]:.1e}",
            "entropy, error": f"{errors[kind][1]:.1e}",
        }
        for kind in KINDS
    ]
