"""A frozen model as pure functions of (params, rows); functional_call: only here and in islands.py."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..progress import NOTHING_KEPT, Progress
from ..ranks import ALONE, Ranks
from ..tree import require_same
from ..types import InputError, Params
from .blocks import placed
from .layout import Layout
from .parts import Backbone, Head
from .placement import head_device, input_device, is_hooked, refuse_out_of_reach, unwrapped
from .precision import arithmetic_of, products_dtype
from .readout import Readout
from .rows import Rows
from .suitability import (
    causal_lm,
    longest_position,
    refuse_longer,
    refuse_padding_rows,
    refuse_unsuitable,
    refuse_unsupported,
    require_causal_lm,
)
from .trials import find_backbone, find_readout, unpackable

T = TypeVar("T")


class Forward(NamedTuple):
    """A policy as functions of its trainable parameters; everything else is fixed.

    hidden(params, rows) -> hidden_TD, the backbone's hidden states that predict the response tokens;
    logits(params, hidden_TD) -> logits_TV of p_theta = softmax(logits), divided by `temperature`.
    `coarsest` is the least precise dtype that the values pass through. `readout` is the output
    embedding, if it is frozen and alone determines the logits; `layout` the most compact layout of rows
    that the model can process; `notes` state why nothing faster is used. `halved` is called with the
    new bound on a microbatch's tokens after memory ran out. `ranks` are processes that share a pass.
    With `recompute`, gradients keep the inputs of layers alone and compute these again (`unlayered`
    says whether they can); `recomputing` is called when they begin to because memory ran out on a
    single sequence. `progress` gets what a pass has after each microbatch, and gives what an
    interrupted one had.
    """

    hidden: Callable[..., Tensor]
    logits: Callable[..., Tensor]
    coarsest: torch.dtype
    readout: Readout | None
    layout: Layout
    notes: tuple[str, ...] = ()
    halved: Callable[[int], None] = lambda _: None
    ranks: Ranks = ALONE
    recompute: bool = False
    recomputing: Callable[[], None] = lambda: None
    progress: Progress = NOTHING_KEPT


def trainable_params(model: nn.Module) -> Params:
    """The registry: the trainable parameters by name, sorted, detached, sharing the model's storage.

    Raises InputError if two of them share memory: an optimizer would update it twice, and the two are
    not independent coordinates of theta (peft's ensure_weight_tying creates such pairs).
    """
    parameters = unwrapped(model).named_parameters()
    named = {n: p.detach() for n, p in sorted(parameters) if p.requires_grad}
    owner: dict[int, str] = {}
    for name, tensor in named.items():
        other = owner.setdefault(tensor.data_ptr(), name)
        if other != name and tensor.data_ptr():  # null on the meta device
            raise InputError(
                f"{other} and {name} share memory (ensure_weight_tying?), so that they are not "
                "independent parameters: use an adapter whose tensors do not share memory"
            )
    return named


def lora_params(params: Params) -> Params:
    """The LoRA tensors of a registry, and a trainable lm_head if it has one."""
    return {n: t for n, t in params.items() if "lora_" in n or "lm_head" in n}


def frozen_forward(
    model: nn.Module, params: Params, temperature: float = 1.0, layout: Layout = "shared"
) -> Forward:
    """Bind the model: pure functions that take exactly the names and shapes of `params`.

    `layout` is the most compact one allowed; it is used if the model can process it.

    The model is a Hugging Face causal language model, with or without peft; it is never changed. Raises
    InputError, here and at every call, where its outputs would silently differ from the policy's:
    training mode, gradient checkpointing, compiled layers, adapters that are merged, disabled or not
    active. Raises it here for models that are not causal, weights that are packed, sharded or
    offloaded, peft's variants of LoRA (DoRA and others), a trained embedding with padding_idx, and
    logits that need more than the backbone's last hidden state. Layers may be on several devices.
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature = {temperature}: a positive, finite number is expected")
    model = unwrapped(model)
    require_causal_lm(model)
    refuse_out_of_reach(model)
    refuse_unsupported(model)
    refuse_unsuitable(model, params)
    refuse_padding_rows(model, params)
    limit = longest_position(model)
    places = _places(model, params)

    def call(module: nn.Module, given: Params, *args: Any) -> Tensor:
        # functional_call ignores unknown names, which would make the result silently wrong.
        require_same(params, given)
        with arithmetic_of(given):
            # torch 2.13 resolves tied weights itself, but where two names lead to one module (peft's
            # tied trainable tokens) it swaps twice and leaves the given tensor in the model.
            swapped = {f"model.{place}": given[name] for place, name in places.items()}
            out: Tensor = functional_call(module, swapped, args, tie_weights=False)
        return out

    def hidden_at(
        path: str, given: Params, rows: Rows, size: int | None = None
    ) -> Float[Tensor, "T D"]:
        # At every call, as the caller may have left eval mode or entered disable_adapter() since.
        refuse_unsuitable(model, params)
        refuse_longer(rows, limit)
        tokens_NL = placed(rows.tokens_NL, input_device(model))
        hidden_NLD = call(Backbone(model, path, size), given, tokens_NL, rows.packing)
        last = hidden_NLD.device
        hidden_TD = hidden_NLD[placed(rows.row_T, last), placed(rows.position_T, last)]
        return hidden_TD.to(head_device(model))  # of a split model; else a Tensor's to() is itself

    def logits_at(path: str, given: Params, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        return call(Head(model, path), given, hidden_TD) / temperature

    def both(path: str, rows: Rows) -> Float[Tensor, "T V"]:
        return logits_at(path, params, hidden_at(path, params, rows))

    path = find_backbone(model, params, both, temperature)
    logits = partial(logits_at, path)

    def hidden(given: Params, rows: Rows) -> Float[Tensor, "T D"]:
        if forward.readout is not None and is_hooked(causal_lm(model).get_output_embeddings()):
            raise InputError("the output embedding has a new hook, which would be skipped: bind again")
        return hidden_at(path, given, rows)

    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtypes |= {products_dtype(p.dtype, p.device) for p in params.values()}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    forward = Forward(hidden, logits, coarsest, None, "plain")
    forward = forward._replace(readout=find_readout(model, path, params, logits, temperature))
    try_hidden = partial(hidden_at, path)
    why_plain = None if layout == "plain" else unpackable(model, path, params, try_hidden)
    notes = [] if why_plain is None else [f"one sequence per row, prompts not shared: {why_plain}"]
    if forward.readout is None:
        notes.append("output embedding trained, or not a plain matrix: derivatives not in closed form")
    return forward._replace(layout="plain" if why_plain else layout, notes=tuple(notes))


def with_params(model: nn.Module, given: Params, compute: Callable[[], T]) -> T:
    """compute() with `given` in place of the model's parameters of these names, restored afterwards.

    For code that needs the model itself, such as generate(). Raises ValueError if `given` has a name or
    shape that the model does not have.
    """
    model = unwrapped(model)
    own = dict(model.named_parameters())
    require_same({n: own[n].detach() for n in given.keys() & own.keys()}, given)
    swapped = {f"model.{place}": given[name] for place, name in _places(model, given).items()}
    out: T = functional_call(_Compute(model), swapped, (compute,), tie_weights=False)
    return out


class _Compute(nn.Module):
    """Calls a function in place of a model, so that functional_call swaps the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


def _places(model: nn.Module, params: Params) -> dict[str, str]:
    """{path of a registry parameter in the model, tied paths included: its registry name}."""
    name_of = {id(p): name for name, p in model.named_parameters() if name in params}
    return {
        f"{prefix}.{name}" if prefix else name: name_of[id(p)]
        for prefix, module in model.named_modules()  # each module under its first name only
        for name, p in module.named_parameters(recurse=False)
        if id(p) in name_of
    }
