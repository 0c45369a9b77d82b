"""A gradient that keeps the inputs of each layer alone, and computes the layers again, one at a time.

With z_i = f_i(z_(i-1), theta_i), the backward pass of layer i needs what f_i has inside. It is computed
a second time from z_(i-1) and dropped again, so that the activations of one layer are held instead of
those of all: one more forward, without its attention, whose outputs are kept on a CPU. The operations
are the same, and so is the gradient.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..autodiff.attention_kept import Attention, Kept
from ..autodiff.replaced import Replaced
from ..types import InputError
from .parameter_lora import parameter_lora
from .placement import twin_of


class NotLayeredError(InputError):
    """The model's layers cannot be computed again one at a time."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"gradients of this model cannot recompute its layers: {why}: use a smaller max_tokens, or "
            "shorter responses"
        )
        self.why = why


class LayerByLayer(Replaced):
    """While active, the backbone's layers are those of `layered`, and their attention is kept.

    Enter it around `Forward.hidden` in plain autograd, outside all other modes, with parameters that
    are leaves. Modes that are active inside it are active in the second computation as well, with the
    state that they had in the first (a count of calls, say); tensors that they read and that need a
    gradient are their `reads`, leaves too.
    """

    def __init__(self) -> None:
        super().__init__({scaled_dot_product_attention: self._attend})
        self.layers = 0  # calls of layers
        # Of a layer's calls of attention: so far, in the first computation; to come, in the second.
        self.kept: list[Kept | None] | None = None
        self.left: Iterator[Kept | None] | None = None

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        call = Attention(*args, **kwargs)
        if self.left is not None:
            kept = next(self.left)
            return call.plain() if kept is None else call.differentiable(kept)
        if self.kept is None:  # outside the layers
            return call.plain()
        kept = call.compute() if call.is_fused() else None
        self.kept.append(kept)
        return call.plain() if kept is None else kept.out_NHLd


def layered(backbone: nn.Module) -> nn.Module:
    """The backbone as it is; inside LayerByLayer with layers that are computed again.

    A copy on the way to each layer, everything else shared: the model itself is not touched.
    """
    stack = _get_current_function_mode_stack()
    mode = next((m for m in reversed(stack) if isinstance(m, LayerByLayer)), None)
    if mode is None:
        return backbone
    for path in _layer_paths(backbone):
        layer = backbone.get_submodule(path)
        twin = copy.copy(layer)
        vars(twin)["forward"] = partial(_first, mode, layer)
        backbone = exchanged(backbone, path, twin)
    return backbone


def exchanged(module: nn.Module, path: str, part: nn.Module) -> Any:
    """The module with another one at `path`: copies on the way there, everything else shared."""
    name, _, rest = path.partition(".")
    twin, own = twin_of(module), module._modules
    inner = own[name]
    assert inner is not None
    vars(twin)["_modules"] = own | {name: exchanged(inner, rest, part) if rest else part}
    return twin


def _layer_paths(backbone: nn.Module) -> list[str]:
    """Of the modules that transformers marks as layers; else of the longest list of one type."""
    paths: list[str] = []
    for path, module in backbone.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in paths)
        if path and hasattr(type(module), "gradient_checkpointing") and not inside:
            paths.append(path)
    if paths:
        return paths
    lists = [
        (len(module), path)
        for path, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
    ]
    count, path = max(lists, default=(0, ""))
    if count < 2:
        raise NotLayeredError("it has no list of layers of one type")
    return [f"{path}.{i}" for i in range(count)]


class _Layer:
    """One call of a layer, that can be made again."""

    def __init__(self, mode: LayerByLayer, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.mode, self.layer = mode, layer
        self.leaves, self.structure = _flat((args, kwargs))
        self.active = [
            i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.requires_grad
        ]
        self.own = {
            f"layer.{prefix}.{name}" if prefix else f"layer.{name}": tensor
            for prefix, module in layer.named_modules()
            for name, tensor in module._parameters.items()
            if tensor is not None and tensor.requires_grad
        }
        stack = _get_current_function_mode_stack()
        inner = stack[max(i for i, m in enumerate(stack) if m is mode) :]
        self.modes: list[tuple[TorchFunctionMode, dict[str, Any]]] = [(m, dict(vars(m))) for m in inner]
        self.reads = [t for m in inner for t in getattr(m, "reads", ())]
        self.kept: list[Kept | None] = []
        self.outputs: Any = None  # structure of the outputs, tensors left out

    def inputs(self) -> list[Tensor]:
        """Everything that a gradient may be asked for; all but the activations are leaves."""
        # Each tensor once: of one under two names, the gradient in either is the whole.
        own = list({id(t): t for t in (*self.own.values(), *self.reads)}.values())
        if not all(t.is_leaf for t in own):
            raise NotLayeredError("its parameters are no leaves of autograd")
        return [*(self.leaves[i] for i in self.active), *own]

    def first(self) -> list[Tensor]:
        """The outputs, without a graph."""
        self.mode.layers += 1
        self.mode.kept = self.kept
        try:
            return self._compute(self.leaves)
        finally:
            self.mode.kept = None

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs as functions of the inputs."""
        leaves = list(self.leaves)
        for i, x in zip(self.active, inputs, strict=True):
            leaves[i] = x
        with _as_they_were(self.modes), parameter_lora(self.layer), torch.enable_grad():
            self.mode.left = iter(self.kept)
            return self._compute(leaves)

    def _compute(self, leaves: list[Any]) -> list[Tensor]:
        args, kwargs = optree.tree_unflatten(self.structure, leaves)
        before = _versions(leaves)
        out = functional_call(_Called(self.layer), self.own, (args, kwargs), tie_weights=False)
        after, structure = _flat((args, kwargs))
        same = structure == self.structure and all(a is b for a, b in zip(after, leaves, strict=True))
        if not same or _versions(leaves) != before:
            raise NotLayeredError(
                f"{type(self.layer).__name__} changes its arguments, as layers that share keys do"
            )
        outs, self.outputs = _flat(out)
        if not all(isinstance(x, Tensor) for x in outs):
            raise NotLayeredError(f"{type(self.layer).__name__} returns other things than tensors")
        return outs


class _Called(nn.Module):
    """Calls a layer's forward, hooks left out: they surround the call of its twin."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, args: Any, kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def _first(mode: LayerByLayer, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = _Layer(mode, layer, args, kwargs)
    outs = _Again.apply(call, *call.inputs())  # type: ignore[no-untyped-call]
    return optree.tree_unflatten(call.outputs, outs)


class _Again(torch.autograd.Function):
    """A layer's outputs; its backward pass computes the layer again."""

    @staticmethod
    def forward(ctx: Any, call: _Layer, *inputs: Tensor) -> tuple[Tensor, ...]:
        outs = call.first()
        ctx.call = call
        ctx.save_for_backward(*inputs[: len(call.active)])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in outs if not x.is_floating_point()))
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        xs = [
            nn.Parameter(x.detach(), requires_grad=need)
            for x, need in zip(ctx.saved_tensors, needs, strict=False)
        ]
        outs = call.again(xs)
        pairs = [(x, g) for x, g in zip(outs, grads, strict=True) if g is not None and x.requires_grad]
        inputs = [*xs, *call.inputs()[len(xs) :]]
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        )
        return None, *(next(found) if need else None for need in needs)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return optree.tree_flatten(tree)


def _versions(leaves: Sequence[Any]) -> list[int]:
    """How often each tensor was written to."""
    return [x._version for x in leaves if isinstance(x, Tensor) and not x.is_inference()]


@contextmanager
def _as_they_were(modes: Sequence[tuple[TorchFunctionMode, dict[str, Any]]]) -> Iterator[None]:
    """Modes active again, with the attributes they had."""
    now = [(mode, dict(vars(mode))) for mode, _ in modes]
    with ExitStack() as stack:
        for mode, then in modes:
            vars(mode).update(then)
            stack.enter_context(mode)
        try:
            yield
        finally:
            for mode, state in now:
                vars(mode).update(state)
