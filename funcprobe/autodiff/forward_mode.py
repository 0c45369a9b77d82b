"""Forward-mode rules where torch's own are slow or missing: linear layers, attention, products."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from .attention_along import attention_along
from .replaced import Replaced
from .transforms import Constants, derivatives, in_transform


class ForwardMode(Replaced):
    """While active, linear layers, attention and elementwise products use the rules of this file.

    For a frozen weight torch's forward mode multiplies the input by a tangent of zeros, a third product
    where two suffice; it is omitted here. The values of attention come from the fused kernel, so that
    they are bit-identical to those of a pass without tangents; in nested forward mode attention is
    torch's own, which needs `sdpa_kernel(SDPBackend.MATH)`. An elementwise product's tangent is summed
    in place. Works under torch.func.jvp and, with less overhead per call, inside forward_ad.dual_level.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                linear: _linear,
                torch.addmm: _addmm,
                torch.mul: _mul,
                torch.Tensor.mul: _mul,
                scaled_dot_product_attention: _attention,
            }
        )


# Argument names are torch's, as models may pass them by keyword.
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (in_transform(input) or in_transform(weight)):
        return _dual_linear(input, weight, bias)
    fixed = not derivatives(weight) and (bias is None or not derivatives(bias))
    if fixed and derivatives(input):
        return _frozen_linear(input, weight, bias, transposed=False)
    return linear(input, weight, bias)


def _addmm(*args: Tensor, **scales: Any) -> Tensor:
    """addmm(bias, input, weight), as GPT-2's Conv1D calls it; any other call is passed to torch."""
    if scales or len(args) != 3:
        return torch.addmm(*args, **scales)
    bias, x, weight = args
    if not any(in_transform(t) for t in args):
        return _dual_addmm(bias, x, weight)
    if derivatives(x) and not derivatives(weight) and not derivatives(bias):
        # Transposed inside the Function: a view created here would count as differentiated.
        return _frozen_linear(x, weight, bias, transposed=True)
    return torch.addmm(bias, x, weight)


def _mul(input: Any, other: Any, **out: Any) -> Tensor:
    """a b with the tangent a b' + a' b; torch's own adds zeros for a factor that has none."""
    factors = [x for x in (input, other) if isinstance(x, Tensor)]
    if out or any(in_transform(x) or x.dtype != factors[0].dtype for x in factors):
        return torch.mul(input, other, **out)
    (a, da), (b, db) = (unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in (input, other))
    moved = ([] if db is None else [a * db]) + ([] if da is None else [da * b])
    if not moved:
        return torch.mul(a, b)
    # Summed in place, and before the values, so that no more than two tensors are held.
    along = torch.add(*moved, out=moved[0]) if len(moved) == 2 else moved[0]
    del moved
    dual: Tensor = make_dual(torch.mul(a, b), along)
    return dual


def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    out: Tensor = _FrozenLinear.apply(x, Constants(weight, bias, transposed))  # type: ignore[no-untyped-call]
    return out


def _dual_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, dx = unpack_dual(input)
    w, dw = unpack_dual(weight)
    b, db = (None, None) if bias is None else unpack_dual(bias)
    out, moved = linear(x, w, b), []
    if dx is not None and dw is not None and w.shape[0] > w.shape[1]:
        # One product with twice the inner dimension avoids a second tensor of the output's size.
        moved.append(linear(torch.cat([dx, x], -1), torch.cat([w, dw], 1)))
    else:
        moved += [] if dx is None else [linear(dx, w)]
        moved += [] if dw is None else [linear(x, dw)]
    return _with_tangent(out, moved, db)


def _dual_addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    (b, db), (x, dx), (w, dw) = (unpack_dual(t) for t in (bias, x, weight))
    out, moved = torch.addmm(b, x, w), []
    moved += [] if dx is None else [dx @ w]
    moved += [] if dw is None else [x @ dw]
    return _with_tangent(out, moved, db)


def _with_tangent(out: Tensor, moved: list[Tensor], dbias: Tensor | None) -> Tensor:
    """`out` with the tangent sum(moved) + dbias; `out` itself if it has none."""
    moved = moved if dbias is None else [*moved, dbias.expand_as(out)]
    return make_dual(out, sum(moved[1:], moved[0])) if moved else out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # A trained position bias. A boolean mask created inside a transform also counts as differentiated.
    followed = attn_mask is not None and attn_mask.is_floating_point() and derivatives(attn_mask)
    if followed:  # the fused kernels have no derivative in their mask either
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa
            )
    if query.dim() != 4 or max(derivatives(x) for x in (query, key, value)) != 1:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if not any(in_transform(x) for x in (query, key, value)):
        return _dual_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    settings = Constants(attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out: Tensor = _Attention.apply(query, key, value, settings)  # type: ignore[no-untyped-call]
    return out


def _dual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    (q, dq), (k, dk), (v, dv) = (unpack_dual(x) for x in (query, key, value))
    moved = [torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv))]
    # The very call of a pass without tangents: which kernel CUDA takes depends on all of it.
    out = scaled_dot_product_attention(
        q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    dual: Tensor = make_dual(out, attention_along([q, k, v, out], moved, mask, is_causal, scale))
    return dual


class _FrozenLinear(torch.autograd.Function):
    """W x + b with W and b constant, differentiable at every level of nested forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, constants: Constants) -> Tensor:
        weight, bias, transposed = constants.values
        return linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Constants], _: Tensor) -> None:
        ctx.weight, _, ctx.transposed = inputs[1].values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ (ctx.weight.T if ctx.transposed else ctx.weight), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        # The Function itself, as plain operations in jvp are not differentiated (pytorch #197867).
        return _frozen_linear(dx, ctx.weight, None, transposed=ctx.transposed)


class _Attention(torch.autograd.Function):
    """Attention by the fused kernel, and its derivative along a direction."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, settings: Constants) -> Tensor:
        mask, dropout_p, is_causal, scale, enable_gqa = settings.values
        return scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, value, ctx.settings = inputs
        ctx.save_for_forward(query, key, value, output)

    @staticmethod
    def jvp(ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor, _: None) -> Tensor:
        mask, _, is_causal, scale, _ = ctx.settings.values
        along = [dquery, dkey, dvalue]
        return attention_along(ctx.saved_tensors, along, mask, is_causal, scale)
