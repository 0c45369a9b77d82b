"""Checkpoint folder or hub id -> a policy ready to be bound: adapter active, frozen base, eval mode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import GenerationConfig

from funcprobe.policy.forward import trainable_params
from funcprobe.policy.layout import out_of_memory
from funcprobe.policy.precision import arithmetic_of
from funcprobe.policy.suitability import causal_lm
from funcprobe.policy.trials import attempt
from funcprobe.types import InputError, Params

from .. import store
from ..config.schema import PolicyConfig
from ..machine.devices import where
from ..machine.home import expanded
from .adapter import BaseName, full_model, open_adapter
from .base import is_local, load_base, load_tokenizer
from .embeddings import fit_vocabulary
from .lora import attach_adapter, read_weights
from .padding import drop_padding_rows
from .quantised import freeze_quantised
from .text_part import require_names_of_parts, require_text_adapter, train_text
from .vocabulary import tokens_without_row

FULL_COPIES = 7
"""Tensors of a parameter's size at the peak: gradients X and Y, v and its parts, P, theta + eta v."""


class Policy(NamedTuple):
    """A loaded policy, with its description for the log."""

    model: Any  # a PeftModel; after full fine-tuning the model itself
    tokenizer: Any
    params: Params  # the registry
    eos_ids: tuple[int, ...]
    pad_id: int
    base: str
    commit: str | None  # of a hub id
    attention: str
    lines: tuple[str, ...]
    revision: str | None = None  # of a hub id, as asked for
    settings: dict[str, Any] = {}  # noqa: RUF012  what else determines the policy; never changed
    padding: dict[torch.nn.Embedding, int] = {}  # noqa: RUF012  the trainer's; never changed
    source: str | None = None  # folder or hub id that was loaded; None: a model in memory


Loader: TypeAlias = Callable[[PolicyConfig, torch.device], Policy]
"""`load_policy`, or one that keeps a base between calls (`resident.Resident`)."""


def load_policy(config: PolicyConfig, device: torch.device) -> Policy:
    """Load base, adapter and tokenizer: the adapter active, the base frozen, no dropout, no caches.

    Every adapter tensor must have a parameter of its name and shape, and every LoRA parameter a tensor.
    With mode "qlora" the base's linear layers are `quantised.FrozenLinear4bit`. A checkpoint with a
    whole model instead of an adapter is fully fine-tuned: all its parameters are the registry. Raises
    InputError, one line, if anything cannot be loaded, for an adapter of another base or of another
    type, a base whose quantisation does not match `mode`, no LoRA parameters, or more than
    `max_trainable`.
    """
    folder = full_model(config)
    loaded = _load_adapter(config, device) if folder is None else _load_full(folder, config, device)
    model, name, tokenizer = loaded.model, loaded.base, loaded.tokenizer
    base = causal_lm(model)
    rows = base.get_input_embeddings().weight.shape[0]
    eos_ids = eos_ids_of(tokenizer, base)
    without_row = tokens_without_row(tokenizer, rows, eos_ids)
    # generate() takes every unset option from here; a base's own top_p or repetition penalty would
    # sample from a distribution other than that of the importance ratios.
    base.generation_config = GenerationConfig()
    check_registry(trainable_params(model), config.max_trainable, full=folder is not None)
    if config.mode == "qlora":
        freeze_quantised(model)
    if config.dtype == "float64":
        model = model.double()
    model.config.use_cache = False
    model = (model if config.device_map else _moved(model, device)).eval()
    padding = drop_padding_rows(model)
    params = trainable_params(model)
    require_finite(model, name.id, config.dtype)
    attention = str(base.config._attn_implementation)
    precision = f"nf4 in {config.dtype}" if config.mode == "qlora" else config.dtype
    at = f" at revision {name.revision}" if name.revision else ""
    lines = (
        f"base {name.id}{at}: {loaded.size:,} parameters, {precision}, {attention} attention, "
        f"on {where(model)}",
        *_registry_lines(config, params, loaded),
        *loaded.lines,
        *without_row,
    )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    return Policy(
        model=model,
        tokenizer=tokenizer,
        params=params,
        eos_ids=eos_ids,
        pad_id=pad_id,
        base=name.id,
        commit=name.commit,
        attention=attention,
        lines=lines,
        revision=name.revision,
        settings=loaded.settings,
        padding=padding,
        source=loaded.source,
    )


class _Loaded(NamedTuple):
    model: Any
    base: BaseName
    source: str  # folder or hub id of the adapter, or of the whole model
    tokenizer: Any
    size: int  # parameters of the base; entries of a packed 4-bit weight
    settings: dict[str, Any]
    lines: tuple[str, ...]


def _load_adapter(config: PolicyConfig, device: torch.device) -> _Loaded:
    source, subfolder, adapter_config, name = open_adapter(config)
    remedy = "set policy.base to a model folder or hub id"
    base, ignored = load_base(name.id, config, device, version=name.version, remedy=remedy)
    size = base.num_parameters()
    places = tokenizer_places(config.checkpoint, source, name.id)
    tokenizer = load_tokenizer(places, version=name.version, trust_remote_code=config.trust_remote_code)
    weights = read_weights(source, subfolder)
    require_names_of_parts(base, weights, source)
    embeddings = fit_vocabulary(base, weights, adapter_config, source)
    model, copied = attach_adapter(
        base, adapter_config, config.adapter, name.id, source, weights, embeddings
    )
    require_text_adapter(model, source)
    fields = adapter_config.to_dict()
    settings = {
        "adapter_config": store.fingerprint({key: stable(fields[key]) for key in sorted(fields)}),
        "embeddings": store.fingerprint(copied),
    }
    return _Loaded(
        model, name, source, tokenizer, size, settings, (*ignored, *embeddings.lines, *name.lines)
    )


def _load_full(folder: str, config: PolicyConfig, device: torch.device) -> _Loaded:
    remedy = "copy the checkpoint again, as the trainer saved it"
    model, ignored = load_base(folder, config, device, version=None, remedy=remedy)
    train_text(model)
    tokenizer = load_tokenizer([folder], version=None, trust_remote_code=config.trust_remote_code)
    name = BaseName(folder, None, None, ())
    return _Loaded(model, name, folder, tokenizer, model.num_parameters(), {}, tuple(ignored))


def _registry_lines(config: PolicyConfig, params: Params, loaded: _Loaded) -> list[str]:
    count = sum(t.numel() for t in params.values())
    if loaded.source != loaded.base.id:
        return [adapter_line(loaded.source, config, params)]
    held = sum(t.numel() * t.element_size() for t in params.values())
    return [
        f"no adapter: all {count:,} parameters in {len(params)} tensors are trained; Adam's state "
        f"takes {2 * held / 2**30:.3g} GiB of memory, the gradients, the parts of v and theta + eta v "
        f"about {FULL_COPIES * held / 2**30:.3g} GiB more"
    ]


def adapter_line(source: str, config: PolicyConfig, params: Params) -> str:
    """Which adapter, and its size."""
    count = sum(t.numel() for t in params.values())
    return f"adapter {source} ({config.adapter}): {len(params)} tensors, {count:,} trainable parameters"


def _moved(model: Any, device: torch.device) -> Any:
    try:
        return model.to(device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            f"the policy does not fit into the memory of {device}: free some, take another run.device "
            'or several (policy.device_map = "auto"), a smaller policy.dtype, or policy.mode = "qlora"'
        ) from error


def check_registry(params: Params, max_trainable: int, *, full: bool = False) -> None:
    """InputError unless some parameter is LoRA's and at most `max_trainable` are trainable.

    After full fine-tuning (`full`) no LoRA is expected.
    """
    largest = max(params, key=lambda n: params[n].numel(), default="")
    if not full and not any("lora_" in name for name in params):
        found = f"{len(params)} trainable tensors, as {largest}" if params else "nothing trainable"
        raise InputError(f"no LoRA parameters ({found}): give a checkpoint with a LoRA adapter")
    total = sum(t.numel() for t in params.values())
    if total > max_trainable:
        raise InputError(
            f"{total:,} parameters in {len(params)} tensors are trainable (largest: {largest}, "
            f"{params[largest].numel():,}), more than policy.max_trainable = {max_trainable:,}: "
            "raise it if this is intended"
        )


def stable(value: Any) -> str:
    """Text that does not depend on the order of a set (peft stores target_modules as one)."""
    return str(sorted(map(str, value)) if isinstance(value, set) else value)


def tokenizer_places(checkpoint: str, source: str, base_id: str) -> tuple[str, ...]:
    """Possible locations of its files, nearest first; verl's is huggingface/, beside the adapter."""
    if not is_local(checkpoint):
        return (base_id,)
    folder, adapter = expanded(checkpoint), Path(source)
    return str(folder), source, str(adapter.parent / "huggingface"), base_id


def require_finite(model: Any, base_id: str, dtype: str) -> None:
    """One forward, so that damaged weights and overflow are found before sampling."""
    embeddings = model.get_input_embeddings().weight
    few = torch.arange(min(5, len(embeddings)), device=embeddings.device)[None]

    def logits_of() -> torch.Tensor:
        with torch.no_grad(), arithmetic_of(trainable_params(model)):
            out: torch.Tensor = model(input_ids=few, use_cache=False).logits
            return out

    logits = attempt(logits_of)
    if isinstance(logits, str):
        raise InputError(f"base {base_id} cannot be run in {dtype}: {logits}")
    if not bool(logits.isfinite().all()):
        raise InputError(
            f"base {base_id} gives logits that are not finite in {dtype}: its weights are damaged, or "
            'too large for this type; try policy.dtype = "float32"'
        )


def eos_ids_of(tokenizer: Any, base: Any) -> tuple[int, ...]:
    """Tokens that end a response, ascending: of the model's generation config and of the tokenizer.

    InputError if neither has one.
    """
    configured = getattr(base.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    found = sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not found:
        raise InputError(
            "neither tokenizer nor model has an end-of-sequence token, which ends responses: set the "
            "tokenizer's eos_token"
        )
    return tuple(found)
