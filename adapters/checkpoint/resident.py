"""One base in memory for the checkpoints of a training: an adapter takes the place of the last."""

import gc
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import set_peft_model_state_dict
from torch import Tensor

from .. import store
from ..config.schema import PolicyConfig
from .adapter import full_model, open_adapter
from .base import is_local, load_tokenizer
from .lora import file_tensors, read_weights, require_same_tensors
from .model import Policy, adapter_line, load_policy, require_finite, stable, tokenizer_places


class Resident:
    """Loads policies one after another, and reads only the adapter where all else is as before.

    All else: settings of the policy, device, base and its files, adapter_config.json, names, shapes and
    types of the tensors, embeddings in the adapter's file, the tokenizer. A policy that was returned
    earlier shares its tensors with the next one, whose values they take: it is to be used no more.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # why the last policy was loaded anew; None: it was not
        self._held: _Held | None = None
        self._anew = "it is the first"  # why, where nothing is held

    def forget(self) -> None:
        """Hold no policy any more, so that the next one is loaded anew."""
        self._held, self._anew = None, "the run before it failed"

    def __call__(self, config: PolicyConfig, device: torch.device) -> Policy:
        """`load_policy`, bit for bit. InputError as there."""
        held = self._held
        found = None if full_model(config) else _read(config, device)
        self.reason = self._anew if held is None else _other(held, found)
        self._held = None  # after an error nothing is known of the tensors
        if self.reason is None:
            assert held is not None  # for the type checker, as below
            assert found is not None
            policy = _refilled(held.policy, config, found)
        else:
            held = None  # two bases would not fit where one does
            gc.collect()
            policy = load_policy(config, device)
        if found is not None:
            frozen = _frozen(policy, config, found)
            self._held = _Held(policy, found.all_else, found.tokenizer_content, frozen)
        return policy


class _Adapter(NamedTuple):
    """What is read of a checkpoint before it is known whether the base can stay."""

    source: str
    weights: dict[str, Tensor]
    tokenizer: Any
    tokenizer_content: Any  # before its first use, which leaves its padding in it
    all_else: dict[str, Any]  # what -> its value; policies with equal ones differ in weights alone


class _Held(NamedTuple):
    policy: Policy
    all_else: dict[str, Any]
    tokenizer_content: Any
    frozen: dict[str, Tensor]  # tensors in the adapter's file that are not the adapter's


def _read(config: PolicyConfig, device: torch.device) -> _Adapter:
    source, subfolder, adapter_config, name = open_adapter(config)
    weights = read_weights(source, subfolder)
    places = tokenizer_places(config.checkpoint, source, name.id)
    tokenizer = load_tokenizer(places, version=name.version, trust_remote_code=config.trust_remote_code)
    fields = adapter_config.to_dict()
    return _Adapter(
        source,
        weights,
        tokenizer,
        _content(tokenizer),
        {
            "the policy's settings": config.model_copy(update={"checkpoint": ""}),
            "the device": device,
            "the base": name[:3],
            "the base's files": store.fingerprint_path(Path(name.id)) if is_local(name.id) else {},
            "adapter_config.json": {key: stable(fields[key]) for key in sorted(fields)},
            "the adapter's tensors": {
                key: (tuple(t.shape), str(t.dtype)) for key, t in weights.items()
            },
        },
    )


def _other(held: _Held, found: _Adapter | None) -> str | None:
    """Why the base cannot stay; None if it can."""
    if found is None:
        return "a whole model was trained"
    for what, value in found.all_else.items():
        if value != held.all_else[what]:
            return f"{what} differ{'' if what.endswith('s') else 's'}"
    if any(not torch.equal(found.weights[key], tensor) for key, tensor in held.frozen.items()):
        return "embeddings in the adapter's file differ"
    content = found.tokenizer_content
    same = content is not None and content == held.tokenizer_content
    return None if same else "the tokenizer differs"


def _refilled(policy: Policy, config: PolicyConfig, found: _Adapter) -> Policy:
    """The policy with the tensors of another file in the place of its own."""
    expected = file_tensors(policy.model, config.adapter)
    own = {key: tensor for key, tensor in found.weights.items() if key in expected}
    require_same_tensors(expected, own, found.source, policy.base)
    set_peft_model_state_dict(policy.model, own, adapter_name=config.adapter)
    for key, tensor in file_tensors(policy.model, config.adapter).items():
        if not torch.equal(tensor, own[key].to(tensor)):
            raise RuntimeError(f"{key} of {found.source} did not reach the model")
    require_finite(policy.model, policy.base, config.dtype)
    base, _, *rest = policy.lines
    lines = (base, adapter_line(found.source, config, policy.params), *rest)
    return policy._replace(tokenizer=found.tokenizer, source=found.source, lines=lines)


def _frozen(policy: Policy, config: PolicyConfig, found: _Adapter) -> dict[str, Tensor]:
    expected = file_tensors(policy.model, config.adapter)
    return {key: tensor for key, tensor in found.weights.items() if key not in expected}


def _content(tokenizer: Any) -> Any:
    """What a tokenizer does, comparable; None where that cannot be read (without a fast tokenizer)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings = (tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.padding_side)
    return (type(tokenizer), backend.to_str(), *settings, tokenizer.model_max_length)
