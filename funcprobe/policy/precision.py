"""float64 throughout: model code that requests float32 inside a float64 model gets float64."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..types import Params


class StayFloat64(TorchFunctionMode):
    """Every request for float32 becomes one for float64 while the mode is active.

    Hugging Face models upcast to float32 inside RMSNorm, softmax and the rotary tables; a model cast
    to float64 passes through float32 there and keeps only float32's accuracy (a small Qwen2: measured /
    predicted at eta = 1e-6 is 0.963 without this mode and 1.0000004 with it).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.full) and any(isinstance(a, float) for a in args):
            # Float32 by default; float64's least number, as a mask's, would overflow there.
            kwargs = {"dtype": torch.float64} | dict(kwargs or {})
        widen = _wide_model if func in (torch.Tensor.to, torch.Tensor.type_as) else _wide
        wide = {k: widen(v) for k, v in kwargs.items()} if kwargs else {}
        return func(*args[:1], *map(widen, args[1:]), **wide)


def arithmetic_of(params: Params) -> AbstractContextManager[Any]:
    """StayFloat64 if a parameter is float64, otherwise a context without effect."""
    is_float64 = any(t.dtype == torch.float64 for t in params.values())
    return StayFloat64() if is_float64 else nullcontext()


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What matrix products of tensors of this dtype round their operands to, as torch is set now.

    Trainers switch float32 products on a GPU to TF32 (`tf32 = True`, or set_float32_matmul_precision),
    which has float16's ten bits: whatever their dtype says, numbers are then as good as those. A CPU
    goes by its instructions, which no setting tells.
    """
    if dtype == torch.float32 and device.type == "cuda":
        reduced = torch.backends.cuda.matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]
        return torch.float16 if reduced else dtype
    return dtype


def rounding(values: Tensor) -> float:
    """What the same operations may differ by where sums are taken in another order.

    Half precision sums in float32 and rounds once; more units in the last place would let a factor
    pass. A pretrained model of 30 layers, whose hidden states have entries far above the others, was
    seen to differ by 127 units of its largest logit in float32.
    """
    eps = torch.finfo(products_dtype(values.dtype, values.device)).eps
    return (4 if eps > 1e-4 else 1000) * eps * float(values.abs().max())


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def _wide_model(argument: Any) -> Any:
    """For x.to(other) and x.type_as(other), which request the dtype of another tensor."""
    is_float32 = isinstance(argument, Tensor) and argument.dtype is torch.float32
    return argument.double() if is_float32 else _wide(argument)
