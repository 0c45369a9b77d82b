"""The reference policy of a KL term: the base model, or the adapter from which the training began."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from peft import PeftConfig, PeftModel

from funcprobe.policy.reference import adapter_params, base_params
from funcprobe.types import InputError, Params

from .adapter import ADAPTER_FILES, REPEATABLE_INITS, read_adapter_config
from .adapter_fields import APPLIED
from .base import is_local
from .lora import file_tensors, read_weights
from .model import Policy

# TRL's names: it trains the adapter "default", and keeps a frozen copy of it where that was given
# trained, for a KL term. peft saves the copy in a folder of its name.
TRAINED, INITIAL = "default", "ref"
# Of the settings in adapter_config.json, those by which two adapters on one base differ.
_SETTINGS = APPLIED - {"base_model_name_or_path", "revision", "peft_type", "task_type"}
_TRAINED_TWICE = (".modules_to_save.", ".trainable_tokens_delta")


def reference_params(policy: Policy) -> Params:
    """Values of the policy's registry at which it is the reference policy of TRL 1.16's KL term.

    `token_stats` of them, with the policy's own forward, are the reference's log-probabilities: no
    second model is loaded, and the policy is not changed. The reference is the adapter "ref" where the
    model, or its checkpoint in the folder ref/, has one: the trainer's copy of the trained adapter that
    it was given. Else it is the model without its adapter (`base_params`), as for a run that began with
    a new one. InputError, one line, for a model that is trained as a whole, and for an adapter "ref"
    that is no such copy.
    """
    model = policy.model
    if not isinstance(model, PeftModel):
        raise InputError(
            f"{policy.source or policy.base}: the whole model was trained, and its reference policy is "
            "another model: give its log-probabilities as the column ref_logp of the rollouts"
        )
    if INITIAL in model.peft_config and model.active_adapter != INITIAL:
        own, other = (model.peft_config[name] for name in (model.active_adapter, INITIAL))
        _require_copy(own, other, f'the adapter "{INITIAL}" of the model')
        return adapter_params(model, policy.params, INITIAL)
    found = initial_adapter(policy)
    return base_params(model, policy.params) if found is None else _read(policy, *found)


def initial_adapter(policy: Policy) -> tuple[str, str | None] | None:
    """(folder, None), or (hub id, subfolder), of the checkpoint's adapter "ref"; None without one.

    InputError for a hub id where that cannot be known without a connection.
    """
    source = policy.source
    if source is None or policy.model.active_adapter != TRAINED:
        return None
    if is_local(source):
        folder = Path(source) / INITIAL
        files = ("adapter_config.json", *ADAPTER_FILES)
        return (str(folder), None) if any((folder / file).is_file() for file in files) else None
    try:
        hf_hub_download(source, "adapter_config.json", subfolder=INITIAL)
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{source}: without a connection it is not known whether it has {INITIAL}/, the adapter "
            "that the training began from: set policy.checkpoint to a folder that it was downloaded to"
        ) from error
    return source, INITIAL


def _require_copy(own: PeftConfig, other: PeftConfig, what: str) -> None:
    """InputError unless an adapter has the settings of the policy's own, and left the base alone."""
    remedy = (
        "give the reference's log-probabilities as the column ref_logp of the rollouts, or remove that "
        "adapter if the reference is the base model"
    )
    given, expected = other.to_dict(), own.to_dict()
    for key in sorted(_SETTINGS):
        if _stable(given.get(key)) != _stable(expected.get(key)):
            raise InputError(
                f"{what} has {key} = {given.get(key)!r:.80}, that of the policy's own adapter, "
                f"{expected.get(key)!r:.80}, is expected, of which a trainer makes it a copy: {remedy}"
            )
    if (init := given.get("init_lora_weights")) in REPEATABLE_INITS:
        raise InputError(
            f'{what} has init_lora_weights = "{init}": adding it took its first factors from the base '
            "once more, so that neither policy nor reference are those of their files: train again "
            "from the adapter converted to plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def _read(policy: Policy, place: str, subfolder: str | None) -> Params:
    """The registry with the tensors of the file of a copy of the policy's adapter."""
    model, what = policy.model, f"the adapter in {place}{f'/{subfolder}' if subfolder else ''}"
    _require_copy(
        read_adapter_config(str(policy.source), None), read_adapter_config(place, subfolder), what
    )
    weights, own = read_weights(place, subfolder), read_weights(str(policy.source), None)
    remedy = "one save_pretrained() writes both: copy the checkpoint again"
    if differ := sorted(weights.keys() ^ own.keys()):
        side = "the policy's adapter has not" if differ[0] in weights else "it has not"
        raise InputError(
            f"{what}: {len(differ)} tensors are not those of the policy's, as {differ[0]} ({side}); "
            f"{remedy}"
        )
    # peft's names in a file, of tensors that share the registry's memory.
    adapter = model.active_adapter
    named = file_tensors(model, str(adapter))
    registry = {tensor.data_ptr(): name for name, tensor in policy.params.items()}
    values: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        if tensor.shape != own[key].shape:
            raise InputError(
                f"{what}: {key} has shape {tuple(tensor.shape)}, that of the policy's, "
                f"{tuple(own[key].shape)}, is expected; {remedy}"
            )
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{what}: {key} contains a non-finite number: the file is damaged")
        if key in named:
            name = registry[named[key].data_ptr()]
            values[name] = tensor.to(policy.params[name])
        # An embedding of the base; trained ones peft may save twice.
        elif not any(kind in key for kind in _TRAINED_TWICE) and not torch.equal(tensor, own[key]):
            raise InputError(f"{what}: {key} is frozen, and differs from the policy's; {remedy}")
    return {name: values[name] for name in policy.params}


def _stable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value
