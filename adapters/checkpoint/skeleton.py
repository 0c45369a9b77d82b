"""The trained model without its weights: the names, shapes and order that positions refer to."""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from funcprobe.policy.forward import trainable_params
from funcprobe.types import InputError, Params

from .adapter import read_adapter_config
from .base import UNLOADABLE, short

# Also raised by transformers and peft, for configurations with numbers, patterns or packages that they
# cannot use.
_UNBUILDABLE = (RuntimeError, AssertionError, ImportError, IndexError, re.error)


class Skeleton(NamedTuple):
    """A model on the meta device, and its registry as zeros that take no memory."""

    model: PeftModel
    params: Params
    base: str


def skeleton(checkpoint: Path, base: str | None, adapter: str) -> Skeleton:
    """The adapter of a checkpoint's folder on its base's configuration.

    Raises InputError, one line, if the configuration of the adapter or of the base is missing.
    """
    config = read_adapter_config(str(checkpoint), None if adapter == "default" else adapter)
    config.init_lora_weights = False  # a decomposition of the base would need its weights
    base_id = base or config.base_model_name_or_path
    if not base_id:
        raise InputError(f"{checkpoint} does not record its base model: give it with --base")
    try:
        base_config = AutoConfig.from_pretrained(str(Path(base_id).expanduser()))
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about initial values, which a skeleton does not have
            empty = AutoModelForCausalLM.from_config(base_config)
            model = get_peft_model(empty, config, adapter_name=adapter)
    except (*UNLOADABLE, *_UNBUILDABLE) as error:
        raise InputError(
            f"the model cannot be built from the configuration of base {base_id} ({short(error)}): "
            "give the base's folder or hub id with --base"
        ) from error
    zero = torch.zeros(())
    params = {name: zero.expand(p.shape) for name, p in trainable_params(model).items()}
    return Skeleton(model, params, str(base_id))
