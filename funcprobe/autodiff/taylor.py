"""Taylor mode: a function's value with its first two derivatives along a path, in one evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from .replaced import Replaced
from .taylor_rules import COMPOSED, RULES, WRONG, Jet, moves, or_zeros
from .transforms import in_transform


def second_jvp(
    f: Callable[..., Any], at: Any, direction: Any, acceleration: Any = None
) -> tuple[Any, Any, Any]:
    """(f, df/dt, d2f/dt2) at t = 0 along at + t direction + t^2 acceleration / 2.

    `at` (the tuple of f's arguments), `direction` and `acceleration` (None: zeros) are trees of tensors
    of the same structure and shapes; each result has the structure of f's output. Torch functions in
    `taylor_rules` use these rules; any other is differentiated by nested torch.func.jvp, by itself, or
    all of f is if one writes into a tensor. Operations hidden from __torch_function__ (inside f:
    torch.func's transforms, torch.jit, custom operators, numpy) silently get derivatives of 0: compare
    the first ones with forward mode's. No graph is kept. Raises RuntimeError where torch has no
    derivative, or a wrong one, and for an argument with a tangent of forward_ad; ValueError if
    structures or shapes differ.
    """
    given: Any = (at, direction, acceleration)
    if any(map(_dual, optree.tree_leaves(given))):
        raise RuntimeError(
            "an argument has a tangent of forward_ad, which Taylor mode does not propagate: use "
            "torch.func.jvp"
        )
    for other in (direction, acceleration):
        if other is not None and _shapes(other) != _shapes(at):
            found, expected = _shapes(other), _shapes(at)
            raise ValueError(f"a direction has shapes {found}, expected the arguments', {expected}")
    # In the order of `at`: a dict is a dict by name, but torch.func.jvp compares the orders as well.
    at, direction, acceleration = (
        other if other is None else optree.tree_map(lambda _, x: _ungraphed(x), at, other)
        for other in (at, direction, acceleration)
    )
    values, spec = optree.tree_flatten(at)
    firsts = optree.tree_leaves(direction)
    seconds = [None] * len(values) if acceleration is None else optree.tree_leaves(acceleration)
    jets = map(_tensor, map(Jet, values, firsts, seconds))
    try:
        # Derivatives of a surrounding torch.func transform are propagated, autograd's are not.
        with torch.set_grad_enabled(any(map(in_transform, values))):
            out = f(*optree.tree_unflatten(spec, jets))
    except _WritesError:
        zeros = optree.tree_map(torch.zeros_like, at)
        return _whole(f, at, direction, zeros if acceleration is None else acceleration)
    return tuple(optree.tree_map(lambda x, n=n: _part(x, n), out) for n in range(3))  # type: ignore[return-value,misc]


def _dual(x: Tensor) -> bool:
    return not in_transform(x) and forward_ad.unpack_dual(x).tangent is not None


def _ungraphed(x: Tensor) -> Tensor:
    """Detached from autograd's graph; tensors of a surrounding torch.func transform are unchanged."""
    return x if in_transform(x) else x.detach()


def _shapes(given: Any) -> Any:
    return optree.tree_map(lambda x: tuple(x.shape), given)


class _WritesError(RuntimeError):
    """A torch function writes into a tensor, as mixture-of-experts layers do to add up outputs."""


class _JetTensor(Tensor):
    """The value of a jet, which it carries; torch functions of it return such tensors."""

    jet: Jet

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSED:
            return COMPOSED[func](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            rule, out = RULES.get(func), NotImplemented
            if rule is not None:
                given = [_jets(x) for x in args]
                out = rule(*given, **{name: _jets(x) for name, x in kwargs.items()})
            if out is NotImplemented:
                return _nested(func, args, kwargs)
            return _tensor(out) if isinstance(out, Jet) else type(out)(map(_tensor, out))


def _tensor(jet: Jet) -> Tensor:
    """The jet as a tensor; constants and integers stay plain tensors."""
    if (jet.first is None and jet.second is None) or not moves(jet.value):
        return jet.value
    tensor = jet.value.as_subclass(_JetTensor)
    tensor.jet = jet
    return tensor


def _jets(x: Any) -> Any:
    """Tensors replaced by their jets, also within a list or tuple."""
    if isinstance(x, _JetTensor):
        return x.jet
    return [_jets(y) for y in x] if type(x) in {list, tuple} and any(map(moves, x)) else x


def _part(x: Any, order: int) -> Any:
    jet = x.jet if isinstance(x, _JetTensor) else Jet(x)
    return or_zeros(jet[order], jet.value) if order else jet.value


def _writes(func: Callable[..., Any], name: str, kwargs: Mapping[str, Any]) -> bool:
    schema = getattr(func, "_schema", None)
    return (
        name == "__setitem__"
        or (name.endswith("_") and not name.endswith("__"))
        or kwargs.get("out") is not None
        or bool(kwargs.get("inplace"))
        or (schema is not None and schema.is_mutable)
    )


def _nested(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Any function by forward over forward mode; the value alone if no output is floating-point."""
    name = getattr(func, "__name__", str(func))
    if name in WRONG:
        raise NotImplementedError(f"{name} has a wrong second derivative in torch's forward mode")
    if _writes(func, name, kwargs):
        raise _WritesError(name)
    given: Any = (args, dict(kwargs))
    leaves, spec = optree.tree_flatten(given)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _JetTensor)]

    def call(*values: Tensor) -> Any:
        instead = dict(zip(places, values, strict=True))
        args, kwargs = optree.tree_unflatten(spec, [instead.get(i, x) for i, x in enumerate(leaves)])
        return func(*args, **kwargs)

    def moving(*values: Tensor) -> list[Tensor]:
        return [x for x in optree.tree_leaves(call(*values)) if moves(x)]

    # Expanded tensors cannot be tangents: several of their entries share one memory location.
    value, first, second = ([_part(leaves[i], n).contiguous() for i in places] for n in range(3))
    outs, out_spec = optree.tree_flatten(call(*value))
    if not any(map(moves, outs)):  # shapes, comparisons, indices
        return optree.tree_unflatten(out_spec, outs)

    moved = iter(map(Jet, *_whole(moving, tuple(value), tuple(first), tuple(second))))
    return optree.tree_unflatten(out_spec, [_tensor(next(moved)) if moves(x) else x for x in outs])


def _whole(f: Callable[..., Any], at: Any, direction: Any, acceleration: Any) -> tuple[Any, Any, Any]:
    """(f, f', f'') by forward over forward mode; `acceleration` is the tangent of `direction`."""

    def fresh(*args: Any) -> Any:
        given: Any = args
        return f(*optree.tree_map(torch.clone, given))  # f may write into its arguments

    def along(at: Any, direction: Any) -> tuple[Any, Any]:
        value, first = jvp(fresh, at, direction)  # type: ignore[misc]
        return value, first

    # Nested forward mode needs grad mode (torch 2.13: "forward AD with aten::silu_backward"), though
    # no gradient is taken here; the fused attention kernels have no forward mode (pytorch #128971).
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), Replaced(COMPOSED):
        (value, first), (_, second) = jvp(along, (at, direction), (direction, acceleration))  # type: ignore[misc]
    return value, first, second
