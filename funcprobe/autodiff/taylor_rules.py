"""First and second derivatives, along a path, of the torch functions that transformers consist of.

With x(t) = x + t x' + t^2 x'' / 2, at t = 0:

    f' = Df x'        f'' = Df x'' + D2f[x', x']

A product with a constant takes three products for f, f' and f''; forward over forward mode takes four,
as it carries x' twice.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from .attention_along import attention_twice_along
from .transforms import in_transform

Rule: TypeAlias = Callable[..., Any]  # arguments of the function, some of them jets -> jet or jets


class Jet(NamedTuple):
    """x, x' and x'', of one shape; None stands for zero."""

    value: Tensor
    first: Tensor | None = None
    second: Tensor | None = None


def moves(x: Any) -> bool:
    """Whether x can have derivatives: a jet, or a floating-point or complex tensor."""
    return isinstance(x, Jet) or (isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()))


def or_zeros(derivative: Tensor | None, value: Tensor) -> Tensor:
    """A derivative of `value`, as zeros if it is None."""
    return torch.zeros_like(value) if derivative is None else derivative


# A rule may return NotImplemented: the function is then differentiated by nested jvp.


def _linear_map(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """f linear in its first argument, a jet or a sequence of jets; all other arguments constant."""
    if not args or any(map(moves, (*args[1:], *kwargs.values()))):
        return NotImplemented
    one = isinstance(args[0], Jet)
    jets = [args[0]] if one else args[0]
    if not (isinstance(jets, Sequence) and all(isinstance(x, Jet) for x in jets)):
        return NotImplemented

    def of(order: int) -> Any:
        if order and all(x[order] is None for x in jets):
            return None
        parts = [or_zeros(x[order], x.value) for x in jets]
        return func(parts[0] if one else parts, *args[1:], **kwargs)

    value, first, second = map(of, range(3))
    if isinstance(value, Tensor):
        return Jet(value, first, second)
    nothing = [None] * len(value)
    return tuple(map(Jet, value, first or nothing, second or nothing))


def _sum(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """x + y, x - y."""
    if kwargs or len(args) != 2:
        return NotImplemented
    a, b = map(_jet, args)
    out = func(a.value, b.value)

    def of(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if x is not None and y is not None:
            return func(x, y)  # type: ignore[no-any-return]
        if x is None:
            x = y if y is None or func in SUMS else -y
        return None if x is None else x.expand(out.shape).to(out.dtype)

    return Jet(out, of(a.first, b.first), of(a.second, b.second))


def _product(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """f linear in each of its two arguments: (f g)'' = f'' g + 2 f' g' + f g''."""
    if kwargs or len(args) != 2:
        return NotImplemented
    a, b = map(_jet, args)
    first = _applied(func, (a.first, b.value), (a.value, b.first))
    second = _applied(func, (a.second, b.value), (a.value, b.second))
    cross = _applied(func, (a.first, b.first))
    return Jet(func(a.value, b.value), _total(first), _total(second + [2 * x for x in cross]))


def _mul(*args: Any, **kwargs: Any) -> Any:
    """Elementwise x y; addcmul adds each term in the same pass over memory that computes it."""
    if kwargs or len(args) != 2:
        return NotImplemented
    a, b = map(_jet, args)
    if a.first is None or b.first is None or a.value.dtype != b.value.dtype:
        return _product(torch.mul, a, b)
    first = torch.addcmul(a.first * b.value, a.value, b.first)
    second = torch.mul(2 * a.first, b.first)
    second = second if a.second is None else torch.addcmul(second, a.second, b.value)
    second = second if b.second is None else torch.addcmul(second, a.value, b.second)
    return Jet(a.value * b.value, first, second)


def _quotient(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """x / c, c constant."""
    if kwargs or isinstance(args[-1], Jet):
        return NotImplemented
    return _product(func, *args)


# Argument names are torch's, as models may pass them by keyword.
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """W x + b."""
    x, w, b = _jet(input), _jet(weight), _jet(bias)
    if (
        w.first is None
        or w.second is not None
        or x.first is None
        or x.second is None
        or w.value.dim() != 2
    ):
        out = linear(x.value, w.value, b.value)
        first = _applied(linear, (x.first, w.value), (x.value, w.first))
        second = _applied(linear, (x.second, w.value), (x.value, w.second))
        second += [2 * y for y in _applied(linear, (x.first, w.first))]
    elif w.value.shape[0] <= w.value.shape[1]:
        # A LoRA matrix: so narrow a product is bound by reading x, so that two in one cost as one.
        both = torch.cat([w.value, w.first])
        (out, moved), (first_x, cross) = (linear(u, both).chunk(2, -1) for u in (x.value, x.first))
        out = out.contiguous() if b.value is None else out + b.value
        first, second = [first_x, moved], [linear(x.second, w.value), 2 * cross]
    else:
        both, out = torch.cat([w.value, w.first], 1), linear(x.value, w.value, b.value)
        first = [linear(torch.cat([x.first, x.value], -1), both)]
        second = [linear(torch.cat([x.second, 2 * x.first], -1), both)]
    first += [] if b.first is None else [b.first.expand_as(out)]
    second += [] if b.second is None else [b.second.expand_as(out)]
    return Jet(out, _total(first), _total(second))


def _addmm(*args: Any, **kwargs: Any) -> Any:
    """b + x W, GPT-2's linear layer."""
    if kwargs or len(args) != 3:
        return NotImplemented
    bias, x, weight = args
    transposed = Jet(*(None if w is None else w.T for w in _jet(weight)))  # type: ignore[arg-type]
    return _linear(x, transposed, bias)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001
) -> Any:
    jets = [_jet(x) for x in (query, key, value)]
    if dropout_p or isinstance(attn_mask, Jet) or any(jet.value.dim() != 4 for jet in jets):
        return NotImplemented
    if any(in_transform(part) for jet in jets for part in jet if part is not None):
        return NotImplemented  # the rule writes into tensors of its own, which no transform follows
    q, k, v = ([or_zeros(part, jet.value) for part in jet] for jet in jets)
    return Jet(*attention_twice_along(q, k, v, attn_mask, is_causal, scale))


def _elementwise(derivatives: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """y = f(x) elementwise, from `derivatives`: x -> (y, dy/dx, d2y/dx2)."""
    others = kwargs.items() - {("inplace", False)}  # as nn.SiLU passes it
    if others or not args or not isinstance(args[0], Jet) or any(map(moves, args[1:])):
        return NotImplemented
    x = args[0]
    found = derivatives(x.value, *args[1:])
    if found is NotImplemented:
        return NotImplemented
    y, slope, curvature = found
    quadratic = None if x.first is None else curvature * x.first.square()
    second = _applied(torch.mul, (slope, x.second))
    second += [] if quadratic is None else [quadratic]
    return Jet(y, _total(_applied(torch.mul, (slope, x.first))), _total(second))


def _silu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(x)
    y = x * s
    slope = s + y * (1 - s)
    return y, slope, (1 - s) * (s + slope - y * s)


def _power(x: Tensor, exponent: Any) -> Any:
    if not isinstance(exponent, int | float) or exponent in {0, 1}:  # else 0 * inf at x = 0
        return NotImplemented
    slope, curvature = exponent * x ** (exponent - 1), exponent * (exponent - 1) * x ** (exponent - 2)
    return x**exponent, slope, curvature


def _rsqrt(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.rsqrt(x)
    cubed = y * y * y
    return y, -cubed / 2, 0.75 * cubed * y * y


def _tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.tanh(x)
    slope = 1 - y * y
    return y, slope, -2 * y * slope


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:  # noqa: ARG001
    return NotImplemented if training else input


def _layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Tensor:
    """layer_norm in elementary operations, as torch's nested forward mode of it is silently wrong.

    torch 2.13, pytorch #196700: off by 90 % on random input; rms_norm, softmax and the activations are
    correct.
    """
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _jet(x: Any) -> Jet:
    return x if isinstance(x, Jet) else Jet(x)


def _applied(func: Callable[..., Tensor], *pairs: tuple[Tensor | None, Tensor | None]) -> list[Tensor]:
    return [func(x, y) for x, y in pairs if x is not None and y is not None]


def _total(terms: list[Tensor]) -> Tensor | None:
    return sum(terms[1:], terms[0]) if terms else None


def _named(names: str) -> list[Any]:
    """The functions and methods of these names; the operators (x + y) call one of them, too."""
    found = [getattr(owner, n, None) for owner in (torch, Tensor, functional) for n in names.split()]
    return [f for f in found if callable(f)]


SUMS = _named("add")
MAPS = """
    view reshape transpose permute contiguous to float double clone __getitem__ cat concat stack
    split chunk unbind neg negative mean sum expand unsqueeze squeeze flatten unflatten t
    repeat repeat_interleave index_select select narrow movedim swapaxes flip roll
"""
RULES: dict[Any, Rule] = {
    **{f: partial(_linear_map, f) for f in _named(MAPS)},
    Tensor.T.__get__: partial(_linear_map, Tensor.T.__get__),  # type: ignore[attr-defined]
    Tensor.mT.__get__: partial(_linear_map, Tensor.mT.__get__),  # type: ignore[attr-defined]
    **{f: partial(_sum, f) for f in (*SUMS, *_named("sub"))},
    **dict.fromkeys(_named("mul multiply"), _mul),
    **{f: partial(_quotient, f) for f in _named("div true_divide")},
    **{f: partial(_product, f) for f in _named("matmul mm bmm")},
    linear: _linear,
    torch.addmm: _addmm,
    functional.scaled_dot_product_attention: _attention,
    **dict.fromkeys(_named("silu"), partial(_elementwise, _silu)),
    **dict.fromkeys((*_named("pow"), Tensor.__pow__), partial(_elementwise, _power)),
    **dict.fromkeys(_named("rsqrt"), partial(_elementwise, _rsqrt)),
    **dict.fromkeys(_named("tanh"), partial(_elementwise, _tanh)),
    functional.dropout: _dropout,
}
# Wrong for the same reason, by 14 to 109 %; layer_norm is in COMPOSED unless called as an operator.
WRONG = frozenset({"native_layer_norm", "layer_norm.default", "instance_norm", "batch_norm"})
COMPOSED: dict[Any, Callable[..., Tensor]] = dict.fromkeys(_named("layer_norm"), _layer_norm)
