"""Every key of adapter_config.json: applied, without effect on the policy, or rejected by name.

Of peft 0.21. Keys that peft does not know are dropped by it with a Python warning.
"""

from pathlib import Path
from typing import Any

import peft

from funcprobe.types import InputError

APPLIED = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "lora_bias",
        "bias",
        "fan_in_fan_out",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "layer_replication",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
        "init_lora_weights",
    }
)
"""peft builds the policy from them, or they are checked one by one (`adapter.py`)."""

WITHOUT_EFFECT = {
    "auto_mapping": "names the base's class, which its own configuration does as well",
    "peft_version": "of the library that wrote the file",
    "inference_mode": "only whether peft's loader freezes the adapter",
    "lora_dropout": "is active in training mode only",
    "megatron_core": "is read with megatron_config only",
    "qalora_group_size": "is read with use_qalora only",
    "runtime_config": "only where weights are kept",
    "loftq_config": "settings of an initialisation, which init_lora_weights names",
    "eva_config": "settings of an initialisation, which init_lora_weights names",
    "corda_config": "settings of an initialisation, which init_lora_weights names",
    "lora_ga_config": "settings of an initialisation, which init_lora_weights names",
    # Of other programs, or of earlier versions of peft:
    "merge_weights": "of peft before 0.3: whether its layers merged themselves in evaluation",
    "lorap_lr_ratio": "of ms-swift: learning rates, which the optimizer's state has",
    "lorap_emb_lr": "of ms-swift: learning rates, which the optimizer's state has",
}
"""Key -> why it does not change the policy."""

NESTED = frozenset({"eva_config", "corda_config", "lora_ga_config", "runtime_config"})
"""Of these, with fields of their own: peft 0.21 recurses without end on one that it does not know."""

REJECTED = {
    "use_dora": "DoRA is not supported: peft holds its weight norm fixed in derivatives, so that they "
    "are not those of the policy; use plain LoRA",
    "alora_invocation_tokens": "activated LoRA is not supported: the adapter acts after these tokens "
    "only; use plain LoRA",
    "arrow_config": "Arrow is not supported: it mixes several adapters, token by token; give one plain "
    "LoRA adapter",
    "kasa_config": "KaSA is not supported, as it truncates the base's weights; use plain LoRA",
    "monteclora_config": "MonteCLoRA is not supported, as it samples its weights; use plain LoRA",
    "use_bdlora": "block-diagonal LoRA is not supported; use plain LoRA",
    "use_qalora": "QA-LoRA is not supported, as it pools its inputs; use plain LoRA",
    "velora_config": "VeLoRA is not supported: its training gradient is not that of the policy; use "
    "plain LoRA",
    "megatron_config": "Megatron's parallel layers are not supported: convert the checkpoint to "
    "transformers' layers",
}
"""Key -> why it is rejected where it is set, and what to do."""


LONGEST_NAME = 4096
"""Characters of a folder or hub id; Linux opens no longer path."""


def check_fields(found: dict[str, Any], source: str | Path) -> None:
    """InputError for a key that is set and rejected, or that neither peft nor these lists know.

    Also for a base or revision that is no name: as a path it would fail far from here, and what is no
    string would be asked of the hub as one.
    """
    for key in ("base_model_name_or_path", "revision"):
        name = found.get(key)
        named = isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()
        if not (name is None or named):
            raise InputError(
                f"{source}: adapter_config.json has {key} = {_shown(name)}, expected null or at most "
                f"{LONGEST_NAME} printable characters: correct it, or set it to null and "
                "name the base in policy.base"
            )
    for key, value in sorted(found.items()):
        if _blank(value) or key in APPLIED or key in WITHOUT_EFFECT:
            continue
        if key in REJECTED:
            raise InputError(
                f"{source}: adapter_config.json has {key} = {_shown(value)}: {REJECTED[key]}"
            )
        raise InputError(
            f"{source}: adapter_config.json has {key} = {_shown(value)}, which peft {peft.__version__} "
            "drops and funcprobe does not know, so that the policy could be another than the trained "
            "one: delete the key if it has no effect on the model"
        )
    task = found.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{source}: adapter_config.json has task_type = {_shown(task)}, a model with another head: "
            "the adapter of a causal language model (CAUSAL_LM) is expected"
        )


def _blank(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
