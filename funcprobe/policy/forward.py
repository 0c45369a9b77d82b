"""A frozen model as pure functions of (params, rows); functional_call: only here and in islands.py."""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..tree import require_same
from ..types import InputError, Params
from .attention import OwnHeads, PackedAttention, no_mask
from .layout import Layout, collate, microbatches
from .precision import arithmetic_of, products_dtype, rounding
from .readout import Readout, values
from .rows import Packing, Rows, packed_rows, plain_rows
from .suitability import (
    causal_lm,
    is_hooked,
    longest_position,
    refuse_longer,
    refuse_unsuitable,
    refuse_unsupported,
    require_causal_lm,
)

T = TypeVar("T")


class Forward(NamedTuple):
    """A policy as functions of its trainable parameters; everything else is fixed.

    hidden(params, rows) -> hidden_TD, the backbone's hidden states that predict the response tokens;
    logits(params, hidden_TD) -> logits_TV of p_theta = softmax(logits), divided by `temperature`.
    `coarsest` is the least precise dtype that the values pass through. `readout` is the output
    embedding, if it is frozen and alone determines the logits; `layout` the most compact layout of rows
    that the model can process; `notes` state why nothing faster is used. `halved` is called with the
    new bound on a microbatch's tokens after memory ran out.
    """

    hidden: Callable[..., Tensor]
    logits: Callable[..., Tensor]
    coarsest: torch.dtype
    readout: Readout | None
    layout: Layout
    notes: tuple[str, ...] = ()
    halved: Callable[[int], None] = lambda _: None


def trainable_params(model: nn.Module) -> Params:
    """The registry: the trainable parameters by name, sorted, detached, sharing the model's storage.

    Raises InputError if two of them share memory: an optimizer would update it twice, and the two are
    not independent coordinates of theta (peft's ensure_weight_tying creates such pairs).
    """
    named = {n: p.detach() for n, p in sorted(model.named_parameters()) if p.requires_grad}
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
    active. Raises it here for models that are not causal, packed weights, peft's variants of LoRA (DoRA
    and others), and logits that are not the output embedding of the backbone's hidden state.
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature = {temperature}: a positive, finite number is expected")
    require_causal_lm(model)
    refuse_unsupported(model)
    refuse_unsuitable(model, params)
    backbone, head, limit = _Backbone(model), _Head(model), longest_position(model)
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

    def hidden(given: Params, rows: Rows) -> Float[Tensor, "T D"]:
        # At every call, as the caller may have left eval mode or entered disable_adapter() since.
        refuse_unsuitable(model, params)
        if forward.readout is not None and is_hooked(causal_lm(model).get_output_embeddings()):
            raise InputError("the output embedding has a new hook, which would be skipped: bind again")
        refuse_longer(rows, limit)
        device = next(iter(given.values())).device
        packing = None if rows.packing is None else rows.packing.to(device)
        hidden_NLD = call(backbone, given, rows.tokens_NL.to(device), packing)
        return hidden_NLD[rows.row_T.to(device), rows.position_T.to(device)]

    def logits(given: Params, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        return call(head, given, hidden_TD) / temperature

    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtypes |= {products_dtype(p.dtype, p.device) for p in params.values()}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    forward = Forward(hidden, logits, coarsest, _readout(model, params, temperature), "plain")
    _refuse_other_logits(model, params, forward, temperature)
    if not _reads(params, forward):
        forward = forward._replace(readout=None)
    why_plain = None if layout == "plain" else _unpackable(model, params, forward)
    notes = [] if why_plain is None else [f"one sequence per row, prompts not shared: {why_plain}"]
    if forward.readout is None:
        notes.append("output embedding trained, or not a plain matrix: derivatives not in closed form")
    return forward._replace(layout="plain" if why_plain else layout, notes=tuple(notes))


def with_params(model: nn.Module, given: Params, compute: Callable[[], T]) -> T:
    """compute() with `given` in place of the model's parameters of these names, restored afterwards.

    For code that needs the model itself, such as generate(). Raises ValueError if `given` has a name or
    shape that the model does not have.
    """
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


class _Backbone(nn.Module):
    """tokens_NL -> last hidden state, before the output embedding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_NL: Tensor, packing: Packing | None) -> Tensor:
        backbone = _backbone(self.model)
        if packing is None:
            with nullcontext() if tokens_NL.device.type == "cpu" else OwnHeads():
                out = backbone(input_ids=tokens_NL, use_cache=False)
        else:
            with PackedAttention(packing):
                out = backbone(
                    input_ids=tokens_NL,
                    position_ids=packing.position_1S,
                    attention_mask=no_mask(tokens_NL.device),
                    use_cache=False,
                )
        hidden_NLD: Tensor = out.last_hidden_state
        return hidden_NLD


class _Head(nn.Module):
    """hidden_TD -> logits_TV: output embedding, then Gemma's softcap if the config has one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_TD: Tensor) -> Tensor:
        base = causal_lm(self.model)
        logits_TV: Tensor = base.get_output_embeddings()(hidden_TD)
        softcap = getattr(base.config, "final_logit_softcapping", None)
        return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)


def _places(model: nn.Module, params: Params) -> dict[str, str]:
    """{path of a registry parameter in the model, tied paths included: its registry name}."""
    name_of = {id(p): name for name, p in model.named_parameters() if name in params}
    return {
        f"{prefix}.{name}" if prefix else name: name_of[id(p)]
        for prefix, module in model.named_modules()  # each module under its first name only
        for name, p in module.named_parameters(recurse=False)
        if id(p) in name_of
    }


def _backbone(model: nn.Module) -> Any:
    base = causal_lm(model)
    return getattr(base, base.base_model_prefix)


def _readout(model: nn.Module, params: Params, temperature: float) -> Readout | None:
    """The output embedding; None if a part of it is trained or it is not a plain matrix."""
    base = causal_lm(model)
    embedding = base.get_output_embeddings()
    trained = {id(p) for name, p in model.named_parameters() if name in params}
    plain = type(embedding) is nn.Linear and not is_hooked(embedding)
    if not plain or trained & {id(p) for p in embedding.parameters()}:
        return None
    softcap = getattr(base.config, "final_logit_softcapping", None)
    bias = None if embedding.bias is None else embedding.bias.detach()
    return Readout(embedding.weight.detach(), bias, softcap, temperature)


def _reads(params: Params, forward: Forward) -> bool:
    """Whether the readout, if any, gives the same probabilities as the head's own logits."""
    if forward.readout is None:
        return False
    device, width = next(iter(params.values())).device, forward.readout.weight_VD.shape[1]
    draw = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(4, width, generator=draw).to(device, forward.readout.weight_VD.dtype)
    target_T = torch.arange(4, device=device) % len(forward.readout.weight_VD)
    with torch.no_grad():
        logits_TV = forward.logits(params, hidden_TD)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        theirs_T = torch.log_softmax(logits_TV, -1).gather(-1, target_T[:, None])[:, 0]
        ours_T, _ = values(hidden_TD, target_T, forward.readout)
    # The head applies softcap and temperature in the precision of the logits, the readout in float32.
    bound = rounding(forward.logits(params, hidden_TD)) + rounding(theirs_T)
    return float((ours_T - theirs_T).abs().max()) <= bound


def _unpackable(model: nn.Module, params: Params, forward: Forward) -> str | None:
    """Why the model cannot process a packed row, from its configuration and a trial; None if it can."""
    config = causal_lm(model).config
    config = getattr(config, "get_text_config", lambda: config)()  # nested in multimodal models
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return f"packing needs sdpa attention, the model has {config._attn_implementation}"
    for limit in ("sliding_window", "attention_chunk_size"):
        if getattr(config, limit, None) is not None:
            return f"the model's attention has a {limit}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"the model has layers of type {', '.join(sorted(kinds))}"
    if "position_ids" not in inspect.signature(_backbone(model).forward).parameters:
        return f"{type(_backbone(model)).__name__} takes no position_ids"
    vocabulary = causal_lm(model).get_output_embeddings().weight.shape[0]
    prompts, responses = [[0, 1, 2], [0, 1, 2], [3]], [[3, 4], [1, 0, 2], [4, 5]]
    x, y = ([[t % vocabulary for t in ids] for ids in part] for part in (prompts, responses))
    batch, every, first_N = collate(x, y, [0, 0, 1]), torch.arange(3), torch.tensor([0, 0, 2])
    packed, plain = packed_rows(batch, every, first_N), plain_rows(batch, every)
    with torch.no_grad():
        try:
            packed_TD, plain_TD = (forward.hidden(params, rows) for rows in (packed, plain))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotPackedError included; plain rows have worked before
            return " ".join(str(error).split())[:200]
    worst, bound = float((packed_TD - plain_TD).abs().max()), rounding(plain_TD)
    return None if worst <= bound else f"a token depends on tokens it cannot attend to, by {worst:.2g}"


def _refuse_other_logits(
    model: nn.Module, params: Params, forward: Forward, temperature: float
) -> None:
    """InputError unless the logits are those of the model's own forward, on four tokens."""
    device = next(iter(params.values())).device
    vocabulary = causal_lm(model).get_output_embeddings().weight.shape[0]
    tokens = [i % vocabulary for i in range(5)]
    (rows,) = microbatches(collate([tokens[:1]], [tokens[1:]], [0]), max_tokens=5)
    with torch.no_grad(), arithmetic_of(params):
        read_NL = rows.tokens_NL.to(device)
        theirs_TV = model(input_ids=read_NL, use_cache=False).logits[0] / temperature
    with torch.no_grad():
        ours_TV = forward.logits(params, forward.hidden(params, rows))
    worst = float((ours_TV - theirs_TV).abs().max())
    if not worst <= rounding(theirs_TV):
        raise InputError(
            f"{type(causal_lm(model)).__name__}: logits are not the output embedding of the last "
            f"hidden state (largest difference {worst:.3g}): this architecture is not supported"
        )
