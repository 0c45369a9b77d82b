"""Folder or hub id -> base model and tokenizer, complete, or an InputError."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from funcprobe.policy.layout import out_of_memory
from funcprobe.types import InputError

from ..config.paths import looks_local
from ..config.schema import PolicyConfig
from ..machine.home import expanded
from ..machine.pointers import pointer
from .device_map import placement, require_in_place
from .plausible import require_as_many_numbers, require_plausible
from .quantised import quantisation

# Raised by transformers 5.23, huggingface_hub and safetensors for files that are missing, damaged, or
# of another kind; wrong values in JSON appear as TypeError or IndexError from inside them.
UNLOADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ZeroDivisionError,
    HFValidationError,
    StrictDataclassError,
    SafetensorError,
)
# Raised by torch.load for a .bin file, a pickle in a zip archive, that is damaged.
UNPICKLED = (pickle.UnpicklingError, EOFError, RuntimeError)


def load_base(
    base_id: str, config: PolicyConfig, device: torch.device, *, version: str | None, remedy: str
) -> tuple[Any, list[str]]:
    """The base model, and a line if its files contain weights that the model does not use.

    `version` is the revision of a hub id. `remedy` says what to change if the model cannot be loaded.

    With `device_map` its layers are where that places them. With mode "qlora" it is on `device`, with
    bitsandbytes' linear layers, and in float32 instead of float64, for the caller to widen. Raises
    InputError, one line, if it cannot be loaded, if its
    quantisation does not match `mode`, and for weights that are missing or whose shapes differ from the
    configuration.
    """
    remote: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    remote |= {"revision": version} if version else {}
    place, at = Path(base_id), f"{base_id} at revision {version}" if version else base_id
    if is_local(base_id) and not place.is_dir():
        raise InputError(f"base model {base_id}: no such folder; {remedy}")
    require_plausible(place)
    try:
        # transformers 5.23 would load such an adapter's base, and put both adapters on it.
        adapter = find_adapter_config_file(base_id, revision=version)
        base_config = None if adapter else AutoConfig.from_pretrained(base_id, **remote)
    except UNLOADABLE as error:
        raise pointer(place, "config.json") or InputError(
            f"the base model's configuration cannot be loaded from {at} ({short(error)}): {remedy}"
        ) from error
    if base_config is None:
        raise InputError(
            f"base {at} is itself an adapter (it has adapter_config.json): merge that adapter into its "
            "own base (merge_and_unload) and set policy.base to the merged model; if its weights are "
            "merged already, delete its adapter_config.json"
        )
    dtype = getattr(torch, config.dtype)
    saved = getattr(base_config, "quantization_config", None)
    quantise = quantisation(saved, base_id, config.mode, dtype)
    if config.mode == "qlora":
        dtype = torch.float32 if dtype is torch.float64 else dtype  # bitsandbytes has no float64
        remote |= {"quantization_config": quantise}
    if dtype is torch.float64:
        # Mixtures of experts: transformers 5.23's default, torch's grouped product, has no float64.
        remote |= {"experts_implementation": "eager"}
    remote |= placement(config, device)
    require_as_many_numbers(place, base_config, remedy)
    loaded: Any
    try:
        with _quiet():
            loaded = auto_class(base_config).from_pretrained(
                base_id,
                config=base_config,
                dtype=dtype,
                attn_implementation=None if config.attention == "auto" else config.attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # rejected below, with their names
                **remote,
            )
    except (*UNLOADABLE, *UNPICKLED) as error:
        if out_of_memory(error):
            raise
        if "device_map" in str(error):
            raise InputError(f"policy.device_map: {short(error)}") from error
        weights = "*.safetensors*" if any(place.glob("*.safetensors*")) else "*.bin*"
        raise pointer(place, weights) or InputError(
            f"the base model cannot be loaded from {at} ({short(error)}): {remedy}"
        ) from error
    base, info = loaded
    require_in_place(base, base_id, config)
    # transformers initialises missing tensors at random, and continues.
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"base {base_id}: its files lack {len(missing)} of the model's tensors, as {missing[0]}; "
            f"{remedy} with complete weights"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise InputError(
            f"base {base_id}: {name} has shape {tuple(found)}, expected from its config.json: "
            f"{tuple(expected)}; {remedy} whose configuration and weights match"
        )
    unused = sorted(info["unexpected_keys"])
    if not unused:
        return base, []
    return base, [f"base {base_id}: {len(unused)} tensors in its files are not used, as {unused[0]}"]


def load_tokenizer(places: Sequence[str], *, version: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of the first folder that has one, else of the last entry, which may be a hub id.

    `version` is the revision of that hub id.

    InputError if it is damaged.
    """
    found = (place for place in places if (Path(place) / "tokenizer_config.json").is_file())
    source = next(found, places[-1])
    remote = {"revision": version} if version and source == places[-1] else {}
    remedy = "put the base's tokenizer files there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **remote)
    except BaseException as error:
        # tokenizers raises a bare Exception for a damaged file, or what its Rust panics with.
        kinds = ("Exception", "PanicException")
        if type(error).__name__ not in kinds and not isinstance(error, (*UNLOADABLE, RecursionError)):
            raise
        raise pointer(Path(source), "*token*", "*vocab*", "merges.txt") or InputError(
            f"the tokenizer cannot be loaded from {source} ({short(error)}): {remedy}"
        ) from error
    # Without files transformers 5.23 silently creates one with special tokens alone.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise InputError(f"the tokenizer in {source} has special tokens only: {remedy}")
    return tokenizer


def auto_class(base_config: Any) -> Any:
    """A model that also reads images, where there is no class for its text alone."""
    kind = type(base_config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def is_local(name: str) -> bool:
    """A folder, or a name that is no hub id: those have at most one slash and no checkpoint-N."""
    return expanded(name).exists() or looks_local(name)


def short(error: BaseException) -> str:
    """An exception on one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' loading report, a table of what is reported here in a line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
