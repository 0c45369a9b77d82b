"""A 4-bit base that torch.func can differentiate: its layers as products with dequantised weights."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig

from funcprobe.types import InputError

NEEDED = ("bitsandbytes", "accelerate")


class FrozenLinear4bit(nn.Module):
    """x -> x W^T + bias, where W is the dequantised weight of a bitsandbytes layer, a constant.

    W is dequantised for each product, forward or backward, and not stored, so that a gradient needs
    memory for one layer's weight only. Packed weight and scales are plain attributes, which `double()`
    and `to()` do not change: the model must be on its device already.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed, self.quant_state = layer.weight.data, layer.weight.quant_state
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """W, [out_features, in_features], in the dtype before quantisation."""
        from bitsandbytes.functional import dequantize_4bit

        # StayFloat64 would request float64, which bitsandbytes does not support.
        with torch._C.DisableTorchFunction():
            weight: Tensor = dequantize_4bit(self.packed, self.quant_state)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.bias, self, transposed=False)


class _Product(torch.autograd.Function):
    """x W^T + bias, or x W; its derivatives of every mode and order are again products with W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: FrozenLinear4bit, transposed: bool) -> Tensor:
        weight = layer.weight.to(x.dtype)
        return linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, _, ctx.layer, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return _product(grad, None, ctx.layer, transposed=not ctx.transposed), grad_bias, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, bias: Tensor | None, *_: None) -> Tensor:
        # The same affine map, of the tangents: a plain sum in jvp would have no derivative.
        return _product(x, bias, ctx.layer, transposed=ctx.transposed)


def _product(x: Tensor, bias: Tensor | None, layer: FrozenLinear4bit, *, transposed: bool) -> Tensor:
    out: Tensor = _Product.apply(x, bias, layer, transposed)  # type: ignore[no-untyped-call]
    return out


def quantisation(saved: Any, base_id: str, mode: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The quantisation by from_pretrained; None for no quantisation, or if the files are quantised.

    `saved` is the base's own quantization_config. Raises InputError, one line, for a base that does not
    match `mode`, and if bitsandbytes or accelerate is not installed.
    """
    kind = _kind(saved)
    if mode == "lora":
        if kind is not None:
            way = 'set policy.mode = "qlora", or ' if kind == "bitsandbytes nf4" else "set "
            raise InputError(
                f"base {base_id} is quantised ({kind}): {way}policy.base to the unquantised model"
            )
        return None
    if kind not in {None, "bitsandbytes nf4"}:
        raise InputError(
            f'base {base_id} is quantised ({kind}), policy.mode = "qlora" needs nf4 of bitsandbytes or '
            "an unquantised model: set policy.base to the unquantised model"
        )
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f'policy.mode = "qlora" needs {" and ".join(missing)}: pip install "funcprobe[qlora]"'
        )
    if kind is not None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def freeze_quantised(model: nn.Module) -> None:
    """Replace each Linear4bit of a model, which must be on its device, by a FrozenLinear4bit.

    The logits are those of the same weights dequantised into a plain model. They are *not* those of
    bitsandbytes 0.50 in eval mode on a CPU with AVX512-BF16, which rounds inputs to bfloat16 there
    and repacks the weight in place. Raises InputError if that has already happened.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for parent_name, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, Linear4bit):
                continue
            frozen = FrozenLinear4bit(layer)
            if getattr(frozen.quant_state, "packing_format_for_cpu", False):
                raise InputError(
                    f"{parent_name}.{name}: a forward has repacked the 4-bit weight for the CPU: load "
                    "the model again, and call freeze_quantised() before its first forward"
                )
            setattr(parent, name, frozen)


def _kind(saved: Any) -> str | None:
    """The quantisation of a base, by the name in its configuration; None if unquantised."""
    if saved is None:
        return None
    given = saved if isinstance(saved, dict) else saved.to_dict()
    method = str(given.get("quant_method", "unknown"))
    if method != "bitsandbytes":
        return method
    if given.get("load_in_4bit"):
        return f"bitsandbytes {given.get('bnb_4bit_quant_type', 'fp4')}"
    return "bitsandbytes 8-bit" if given.get("load_in_8bit") else method
