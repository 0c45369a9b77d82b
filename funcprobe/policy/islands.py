"""Finds modules of a float64 model that compute in lower precision, by a change of 1e-10."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..types import InputError
from .placement import input_device, unwrapped
from .precision import arithmetic_of

STEP = 1e-10
# Rounding in float64 gives an error of 1e-16 / STEP, amplified by depth. The spacing of float32, 6e-8,
# exceeds the change of 1e-10, which is rounded away nearly always: an error of order 1.
BOUND = 1e-3

Read: TypeAlias = Callable[[Tensor], Tensor]


class Island(NamedTuple):
    """A module whose outputs do not change as their derivative predicts, although its inputs do."""

    module: str  # name, as in named_modules()
    kind: str  # class
    error: float  # |difference quotient - derivative| / (|derivative| + |output|)


def float32_islands(model: nn.Module, tokens_NL: Int[Tensor, "N L"]) -> list[Island]:
    """The first modules, in the order in which they finish, that lose float64 inside; [] if none do.

    theta (input embedding, buffers, trainable parameters) is changed to theta +- STEP u, u random and
    scaled by |theta|, which changes everything that the model computes. The inputs and outputs f of
    every module are compared with their forward-mode derivative f' along u:

        | (f(theta + STEP u) - f(theta - STEP u)) / (2 STEP) - f' |  <=  BOUND (|f'| + |f|).

    A cast to float32 or below has derivative 1 and responds to STEP with 0 or with a jump. Random
    modules, and modules with a wrong derivative, are reported too. A module is reported if its outputs
    violate the bound while its inputs satisfy it, unless a module inside it is reported; the modules
    after it have inaccurate inputs, so that further islands may show only once it is corrected. A few
    tokens suffice: inputs and outputs of all modules are held three times. The model has hooks during
    the calls and none of them afterwards.

    Raises InputError for a floating-point parameter or buffer that is not float64, and for a forward
    without a forward-mode derivative, or that calls other modules at theta + STEP u than at
    theta - STEP u.
    """
    model = unwrapped(model)
    up, down, direction = _moved(model)
    plus, minus = (_calls(model, moved, tokens_NL, torch.clone) for moved in (up, down))
    with forward_ad.dual_level():
        dual = {place: forward_ad.make_dual(up[place], u) for place, u in direction.items()}
        try:
            slope = _calls(model, dual, tokens_NL, _tangent)
        except RuntimeError as failed:  # NotImplementedError is one
            message = " ".join(str(failed).split())[:200]
            raise InputError(f"the model has no forward-mode derivative: {message}") from failed
    if not _shapes(plus) == _shapes(minus) == _shapes(slope):
        raise InputError(
            f"the model calls other modules when its weights change by {STEP:g} of their size (router, "
            'random forward), so that its precision is unknown: set policy.dtype = "float32"'
        )
    islands: list[Island] = []
    for a, b, d in zip(plus, minus, slope, strict=True):
        error = _largest(a.outputs, b.outputs, d.outputs)
        inside = f"{a.name}." if a.name else ""
        known = any(i.module == a.name or i.module.startswith(inside) for i in islands)
        if error > BOUND and not known and _largest(a.inputs, b.inputs, d.inputs) <= BOUND:
            islands.append(Island(a.name, a.kind, error))
    return islands


class _Call(NamedTuple):
    """Floating-point inputs and outputs of one call of a module."""

    name: str
    kind: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def _moved(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(theta + STEP u, theta - STEP u, u) by name; tensors that several names share change as one."""
    moving = {id(model.get_input_embeddings().weight)}
    moving |= {id(p) for p in model.parameters() if p.requires_grad}
    moving |= {id(b) for b in model.buffers()}
    made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    places: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for prefix, module in model.named_modules():  # each module under its first name only
        own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in chain(*own):
            place = f"{prefix}.{name}" if prefix else name
            if not tensor.is_floating_point():
                continue
            if tensor.dtype != torch.float64:
                raise InputError(
                    f"{place} is {tensor.dtype}, float64 is expected: call model.double(), or set "
                    'policy.dtype = "float64"'
                )
            if id(tensor) in moving:
                if id(tensor) not in made:
                    made[id(tensor)] = _either_side(tensor.detach(), seed=len(made))
                places[place] = made[id(tensor)]
    up, down, direction = ({p: t[i] for p, t in places.items()} for i in range(3))
    return up, down, direction


def _either_side(theta: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(theta + STEP u, theta - STEP u, u), u recomputed from the two after rounding.

    u is normal, scaled elementwise by |theta|: a row of zeros in an embedding stays zero, as what
    follows may be too nonlinear there.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
    size = torch.where(theta.isfinite(), theta.abs(), 0.0)  # a mask's infinities stay
    up, down = theta + STEP * random * size, theta - STEP * random * size
    return up, down, torch.where(theta.isfinite(), (up - down) / (2 * STEP), 0.0)


def _calls(model: nn.Module, tensors: dict[str, Tensor], tokens_NL: Tensor, read: Read) -> list[_Call]:
    """Every call of a module in one forward, in the order in which they finish."""
    calls: list[_Call] = []

    def record(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, gave = ([read(t) for t in _floating(x)] for x in ((args, kwargs), output))
        calls.append(_Call(name, type(module).__name__, given, gave))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_hook(partial(record, name), with_kwargs=True)
            stack.enter_context(hook)
        # The fused attention kernels have no forward mode (pytorch #128971).
        for context in (torch.no_grad(), sdpa_kernel(SDPBackend.MATH), arithmetic_of(tensors)):
            stack.enter_context(context)
        read_NL = tokens_NL.to(input_device(model))
        given = {"input_ids": read_NL, "use_cache": False}
        functional_call(model, tensors, (), given, tie_weights=False)
    return calls


def _floating(tree: Any) -> Iterator[Tensor]:
    """Floating-point tensors in tuples, lists, dicts, transformers' outputs; complex as real pairs."""
    for leaf in optree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_complex():
            yield torch.view_as_real(leaf)
        elif isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf
        elif isinstance(leaf, Mapping):  # a ModelOutput, a class unknown to optree
            yield from _floating(list(leaf.values()))


def _tangent(dual: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(dual).tangent
    return torch.zeros_like(dual) if tangent is None else tangent.clone()


def _shapes(calls: list[_Call]) -> list[Any]:
    return [(c.name, [t.shape for t in (*c.inputs, *c.outputs)]) for c in calls]


def _largest(plus: list[Tensor], minus: list[Tensor], slope: list[Tensor]) -> float:
    """The largest `_error` of corresponding tensors; 0 if there are none."""
    return max((_error(*tensors) for tensors in zip(plus, minus, slope, strict=True)), default=0.0)


def _error(plus: Tensor, minus: Tensor, slope: Tensor) -> float:
    """|difference quotient - derivative| / (|derivative| + |output|); infinite where that is NaN."""
    value, other = plus.double(), minus.double()
    # Equal infinities, as in an attention mask, have not changed.
    moved = torch.where(value == other, torch.zeros_like(value), (value - other) / (2 * STEP))
    expected = slope.double()
    difference = float((moved - expected).norm())
    if difference == 0:
        return 0.0
    error = difference / float(expected.norm() + value.norm())
    return torch.inf if math.isnan(error) else error
