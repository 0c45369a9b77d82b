"""Folder or hub id -> base model and tokenizer, whole and plain, or an InputError."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from funcprobe.types import InputError

from ..config.schema import PolicyConfig
from .quantised import quantisation

# What transformers 5.23, huggingface_hub and safetensors raise for files that are missing, damaged,
# or of another kind: hand-edited JSON comes back as TypeError or KeyError from deep inside them.
UNLOADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
    HFValidationError,
    StrictDataclassError,
    SafetensorError,
)


def load_base(base_id: str, config: PolicyConfig, device: torch.device) -> tuple[Any, list[str]]:
    """The base model, and a line if its files hold weights that the model does not use.

    With mode "qlora" it is on `device`, its linear layers bitsandbytes'; float64 is float32 there, for
    the caller to widen. Raises InputError, one line, for what cannot be loaded, a base quantised
    otherwise than `mode` says, and weights that are missing or of another shape than the
    configuration says.
    """
    remote: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    cure = "set policy.base to a model folder or hub id"
    if is_local(base_id) and not Path(base_id).is_dir():
        raise InputError(f"base model {base_id}: no such folder; {cure}")
    try:
        base_config = AutoConfig.from_pretrained(base_id, **remote)
    except UNLOADABLE as error:
        raise InputError(
            f"the base model's configuration cannot be loaded from {base_id} ({short(error)}): {cure}"
        ) from error
    dtype = getattr(torch, config.dtype)
    saved = getattr(base_config, "quantization_config", None)
    quantise = quantisation(saved, base_id, config.mode, dtype)
    if config.mode == "qlora":
        dtype = torch.float32 if dtype is torch.float64 else dtype  # bitsandbytes has no float64
        # What is quantised on another device may be rounded to another of the sixteen levels.
        remote |= {"quantization_config": quantise, "device_map": {"": str(device)}}
    loaded: Any
    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                base_id,
                config=base_config,
                dtype=dtype,
                attn_implementation=None if config.attention == "auto" else config.attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **remote,
            )
    except UNLOADABLE as error:
        raise InputError(
            f"the base model cannot be loaded from {base_id} ({short(error)}): {cure}"
        ) from error
    base, info = loaded
    # transformers draws what it does not find at random, and goes on.
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"base {base_id}: its files lack {len(missing)} of the model's tensors, as {missing[0]}; "
            f"{cure} whose weights are whole"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise InputError(
            f"base {base_id}: {name} has shape {tuple(found)}, its config.json says "
            f"{tuple(expected)}; {cure} whose configuration and weights belong together"
        )
    unused = sorted(info["unexpected_keys"])
    if not unused:
        return base, []
    return base, [f"base {base_id}: {len(unused)} tensors in its files are not used, as {unused[0]}"]


def load_tokenizer(places: Sequence[str], *, trust_remote_code: bool) -> Any:
    """The tokenizer of the first folder that has one, else of the last place, a hub id perhaps.

    InputError for a damaged one.
    """
    found = (place for place in places if (Path(place) / "tokenizer_config.json").is_file())
    source = next(found, places[-1])
    cure = "put the base's tokenizer files there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        # tokenizers 0.22 raises a bare Exception for a damaged file.
        if type(error) is not Exception and not isinstance(error, UNLOADABLE):
            raise
        raise InputError(
            f"the tokenizer cannot be loaded from {source} ({short(error)}): {cure}"
        ) from error
    # Without files transformers 5.23 makes one of special tokens alone, and says nothing.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise InputError(f"the tokenizer in {source} has special tokens only: {cure}")
    return tokenizer


def is_local(name: str) -> bool:
    """A folder, or what can be nothing else: hub ids have one slash at most, trainers write -N."""
    named_so = name.startswith((".", "/", "~")) or re.search(r"checkpoint-\d+/?$", name) is not None
    return Path(name).expanduser().exists() or named_so or name.count("/") > 1


def short(error: Exception) -> str:
    """An exception on one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' loading report says in a table what is reported here in a line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
