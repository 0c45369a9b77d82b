"""The trained model without its weights: the names, shapes and order that positions refer to."""

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig

from funcprobe.policy.forward import trainable_params
from funcprobe.types import InputError, Params

from ..config.schema import PolicyConfig
from .adapter import base_name, find_adapter, full_model, read_adapter_config
from .base import UNLOADABLE, auto_class, short
from .embeddings import fit_vocabulary
from .plausible import require_plausible
from .text_part import train_text

# Also raised by transformers and peft, for configurations with numbers, patterns or packages that they
# cannot use.
_UNBUILDABLE = (RuntimeError, AssertionError, ImportError, IndexError, re.error)


class Skeleton(NamedTuple):
    """A model on the meta device, and its registry as zeros that take no memory."""

    model: torch.nn.Module
    params: Params
    base: str


def skeleton(checkpoint: Path, base: str | None, adapter: str) -> Skeleton:
    """The adapter of a checkpoint's folder on its base's configuration, or the whole model in it.

    Raises InputError, one line, if the configuration of the adapter or of the base is missing.
    """
    given = PolicyConfig(checkpoint=str(checkpoint), base=base, adapter=adapter)
    folder = full_model(given)
    lora: LoraConfig | None = None
    base_id, version = folder or "", None
    if folder is None:
        lora = read_adapter_config(str(checkpoint), None if adapter == "default" else adapter)
        lora.init_lora_weights = False  # a decomposition of the base would need its weights
        base_id, _, version, _ = base_name(lora, given)
    # None would ask at the terminal, and run a stranger's code at a yes.
    remote: dict[str, Any] = {"trust_remote_code": False}
    remote |= {"revision": version} if version else {}
    model: Any
    require_plausible(Path(base_id))
    try:
        base_config = AutoConfig.from_pretrained(base_id, **remote)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about initial values, which a skeleton does not have
            model = auto_class(base_config).from_config(base_config, trust_remote_code=False)
            if lora is not None:
                fit_vocabulary(model, _shapes(checkpoint, adapter), lora, str(checkpoint))
                model = get_peft_model(model, lora, adapter_name=adapter)
    except InputError:  # a ValueError, and about the adapter
        raise
    except (*UNLOADABLE, *_UNBUILDABLE) as error:
        raise InputError(
            f"the model cannot be built from the configuration of base {base_id} ({short(error)}): "
            "give the base's folder or hub id with --base"
        ) from error
    if lora is None:
        train_text(model)
    zero = torch.zeros(())
    params = {name: zero.expand(p.shape) for name, p in trainable_params(model).items()}
    return Skeleton(model, params, base_id)


def _shapes(checkpoint: Path, adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of the adapter's file, without their values; none where they cannot be known."""
    source, _ = find_adapter(str(checkpoint), None if adapter == "default" else adapter)
    path = Path(source) / "adapter_model.safetensors"
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
