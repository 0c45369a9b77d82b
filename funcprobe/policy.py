"""A frozen model -> pure functions of (params, rows): here, and in islands.py, is functional_call."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from .layout import Rows, collate, microbatches
from .precision import arithmetic_of
from .tree import require_same
from .types import InputError, Params

T = TypeVar("T")


class Forward(NamedTuple):
    """A policy with everything but its trainable parameters applied.

    hidden(params, rows) -> hidden_TD, the backbone where response tokens are predicted;
    logits(params, hidden_TD) -> logits_TV, of p_theta = softmax(logits): divided by `temperature`.
    `coarsest` is the least precise dtype that the values pass through.
    """

    hidden: Callable[..., Tensor]
    logits: Callable[..., Tensor]
    coarsest: torch.dtype


def trainable_params(model: nn.Module) -> Params:
    """The registry: the trainable parameters by their names, sorted, detached, sharing storage.

    Raises InputError where two of them are one memory: an optimizer would move it twice, and the two
    are no independent coordinates of theta (peft's ensure_weight_tying makes such pairs).
    """
    named = {n: p.detach() for n, p in sorted(model.named_parameters()) if p.requires_grad}
    owner: dict[int, str] = {}
    for name, tensor in named.items():
        other = owner.setdefault(tensor.data_ptr(), name)
        if other != name and tensor.data_ptr():  # null on the meta device
            raise InputError(
                f"{other} and {name} share memory (ensure_weight_tying?), so that they cannot be moved "
                "apart: only an adapter whose tensors are its own is supported"
            )
    return named


def lora_params(params: Params) -> Params:
    """The LoRA tensors of a registry, and a trainable lm_head if it has one."""
    return {n: t for n, t in params.items() if "lora_" in n or "lm_head" in n}


def frozen_forward(model: nn.Module, params: Params, temperature: float = 1.0) -> Forward:
    """Bind the model: its pure functions take exactly the names and shapes of `params`.

    The model is a Hugging Face causal language model, with or without peft around it. It is never
    changed. Raises InputError, here and at every call, where its numbers would silently be others
    than the policy's: training mode, gradient checkpointing, compiled layers, adapters merged, disabled
    or not active; here, for models that are not causal, for packed weights, for peft's variants of LoRA
    (DoRA and others), and where logits are not the output embedding of the backbone's hidden state.
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature = {temperature}: a positive, finite number is expected")
    require_causal_lm(model)
    _refuse_unsupported(model)
    _refuse_unsuitable(model, params)
    backbone, head = _Backbone(model), _Head(model)
    places = _places(model, params)

    def call(module: nn.Module, given: Params, *args: Tensor) -> Tensor:
        # functional_call ignores names it does not know, and the result is then silently wrong.
        require_same(params, given)
        with arithmetic_of(given):
            # torch 2.13 finds tied weights by itself, but where two names lead to one module (peft's
            # tied trainable tokens) it swaps twice, and leaves the given tensor in the model.
            swapped = {f"model.{place}": given[name] for place, name in places.items()}
            out: Tensor = functional_call(module, swapped, args, tie_weights=False)
        return out

    def hidden(given: Params, rows: Rows) -> Float[Tensor, "T D"]:
        # Again, as the caller may have left eval mode, or entered disable_adapter(), since.
        _refuse_unsuitable(model, params)
        device = next(iter(given.values())).device
        hidden_NLD = call(backbone, given, rows.tokens_NL.to(device))
        return hidden_NLD[rows.row_T.to(device), rows.position_T.to(device)]

    def logits(given: Params, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        return call(head, given, hidden_TD) / temperature

    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    forward = Forward(hidden, logits, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
    _refuse_other_logits(model, params, forward, temperature)
    return forward


def with_params(model: nn.Module, given: Params, compute: Callable[[], T]) -> T:
    """compute() while the model has `given` in place of its parameters of these names, then as before.

    For what needs the model itself, as generate() does. ValueError where `given` has a name or shape
    that the model has not.
    """
    own = dict(model.named_parameters())
    require_same({n: own[n].detach() for n in given.keys() & own.keys()}, given)
    swapped = {f"model.{place}": given[name] for place, name in _places(model, given).items()}
    out: T = functional_call(_Compute(model), swapped, (compute,), tie_weights=False)
    return out


def require_causal_lm(model: nn.Module) -> None:
    """InputError unless this is a Hugging Face decoder with an output embedding, as logits need one."""
    base = _causal_lm(model)
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    embedding = getattr(base, "get_output_embeddings", lambda: None)()
    if embedding is None or encodes:
        why = "an encoder-decoder" if encodes else "without an output embedding"
        raise InputError(
            f"the model is {type(base).__name__}, {why}: a causal language model is expected, as "
            "AutoModelForCausalLM loads it"
        )


class _Compute(nn.Module):
    """A model in whose place a function is called, so that functional_call swaps its parameters."""

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

    def forward(self, tokens_NL: Tensor) -> Tensor:
        causal_lm = _causal_lm(self.model)
        backbone = getattr(causal_lm, causal_lm.base_model_prefix)
        hidden_NLD: Tensor = backbone(input_ids=tokens_NL, use_cache=False).last_hidden_state
        return hidden_NLD


class _Head(nn.Module):
    """hidden_TD -> logits_TV: output embedding, then Gemma's softcap where the config has one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_TD: Tensor) -> Tensor:
        causal_lm = _causal_lm(self.model)
        logits_TV: Tensor = causal_lm.get_output_embeddings()(hidden_TD)
        softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
        return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)


def _places(model: nn.Module, params: Params) -> dict[str, str]:
    """Every place that holds a parameter of the registry, tied ones too, once -> its registry name."""
    name_of = {id(p): name for name, p in model.named_parameters() if name in params}
    return {
        f"{prefix}.{name}" if prefix else name: name_of[id(p)]
        for prefix, module in model.named_modules()  # each module under its first name only
        for name, p in module.named_parameters(recurse=False)
        if id(p) in name_of
    }


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refuse_unsuitable(model: nn.Module, params: Params) -> None:
    if not params:
        raise InputError("the model has no trainable parameters: load the adapter as trainable")
    if any(module.training for module in model.modules()):
        raise InputError(
            "the model, or a module of it, is in training mode, so dropout is on: call model.eval()"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise InputError(
            "gradient checkpointing is on, which torch.func cannot differentiate: "
            "call gradient_checkpointing_disable() and disable_input_require_grads()"
        )
    if getattr(_causal_lm(model), "_require_grads_hooks", None):
        raise InputError(
            "input gradients are required, which torch.func cannot differentiate: "
            "call disable_input_require_grads()"
        )
    for name, module in _causal_lm(model).named_modules():
        # The model as a whole may be: what is called here are its parts.
        if name and (getattr(module, "_compiled_call_impl", None) or "_orig_mod" in module._modules):
            raise InputError(
                f"{name} is compiled, which torch.func cannot differentiate: bind the model before "
                "compile(), or set its _compiled_call_impl to None meanwhile"
            )
    names = {name for name, _ in model.named_parameters()}
    if unknown := sorted(params.keys() - names):
        raise InputError(f"{unknown[0]} is no parameter of this model: take names from the model")
    prefixes = {p for n in params for p in accumulate(n.split("."), "{}.{}".format)}
    for name, module in model.named_modules():
        if not hasattr(module, "active_adapters"):
            continue
        # lora_A, lora_embedding_A, modules_to_save, ...: each a dict of adapters.
        dicts = {
            f"{name}.{kind}": adapters
            for kind, adapters in module.named_children()
            if isinstance(adapters, nn.ModuleDict | nn.ParameterDict)
        }
        if not dicts:
            continue
        used = {
            a for prefix, adapters in dicts.items() for a in adapters if f"{prefix}.{a}" in prefixes
        }
        active: set[str] = set(module.active_adapters)
        if used - active or getattr(module, "disable_adapters", False):
            raise InputError(
                f"{name}: adapter {', '.join(sorted(used - active)) or 'layers'} not active, so its "
                "parameters would be ignored: call set_adapter() and leave disable_adapter()"
            )
        if getattr(module, "merged", False):
            raise InputError(f"{name}: the adapter is merged into the base: call unmerge_adapter()")


def _refuse_unsupported(model: nn.Module) -> None:
    """What no call can change later: packed weights, and forwards that are not W x + s B A x."""
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or not p.is_floating_point():
            raise InputError(
                f"{name} is a {type(p).__name__} of {p.dtype}, a plain floating-point parameter is "
                "expected: load the base unquantised, or, of bitsandbytes' 4 bits, call "
                "funcprobe.adapters.quantised.freeze_quantised(model) first, before training too"
            )
    for name, module in model.named_modules():
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            if adapter not in module.active_adapters:
                continue
            kind = type(variant).__name__
            if kind.startswith("Dora"):
                raise InputError(
                    f"{name}: DoRA is not supported: peft holds its weight norm fixed in derivatives, "
                    "so that they are not those of the policy"
                )
            raise InputError(
                f"{name}: peft's {kind} is not supported, its forward is not plain LoRA's W x + s B A x"
            )


def _refuse_other_logits(
    model: nn.Module, params: Params, forward: Forward, temperature: float
) -> None:
    """Compare with the model's own forward, once, on four tokens."""
    device = next(iter(params.values())).device
    vocabulary = _causal_lm(model).get_output_embeddings().weight.shape[0]
    tokens = [i % vocabulary for i in range(5)]
    (rows,) = microbatches(collate([tokens[:1]], [tokens[1:]], [0]), max_tokens=5)
    with torch.no_grad(), arithmetic_of(params):
        read_NL = rows.tokens_NL.to(device)
        theirs_TV = model(input_ids=read_NL, use_cache=False).logits[0] / temperature
    with torch.no_grad():
        ours_TV = forward.logits(params, forward.hidden(params, rows))
    # Same operations in the same precision: only the order of sums may differ. Half precision sums in
    # float32 and rounds once; more units in the last place would let a factor on the logits pass.
    eps = torch.finfo(theirs_TV.dtype).eps
    tolerance = (4 if eps > 1e-4 else 100) * eps * float(theirs_TV.abs().max())
    worst = float((ours_TV - theirs_TV).abs().max())
    if not worst <= tolerance:
        raise InputError(
            f"{type(_causal_lm(model)).__name__}: logits are not the output embedding of the last "
            f"hidden state (largest difference {worst:.3g}): this architecture is not supported"
        )
