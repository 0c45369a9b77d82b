"""A sidecar beside each saved optimizer state: the names of its positions, and the run's settings."""

# ruff: noqa: ARG002  (the arguments are the trainer's)
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from funcprobe.types import InputError

from ..optimizer.names import sidecar_content
from ..optimizer.sidecar import FILE
from ..store import write_json, write_whole
from .live import plain_optimizer, policy_of
from .unharmed import unharmed

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes")
LOSS = (
    "loss_type",
    "scale_rewards",
    "beta",
    "epsilon",
    "epsilon_high",
    "delta",
    "num_iterations",
    "importance_sampling_level",
    "multi_objective_aggregation",
    "reward_weights",
    "mask_truncated_completions",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    "entropy_coef",
    "use_adaptive_entropy",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "router_aux_loss_coef",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "normalize_advantages",
    "disable_dropout",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "steps_per_generation",
    "generation_batch_size",
    "world_size",
)
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "num_generations",
    "max_completion_length",
    "generation_kwargs",
    "chat_template_kwargs",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)


class ParamNamesCallback(TrainerCallback):
    """Writes optimizer_param_names.json into each checkpoint-N that the trainer saves.

    It contains the name and shape of every position of optimizer.pt, by the identity of the optimizer's
    parameters, the versions of the libraries, and the settings of loss and sampling in the trainer's
    arguments. For transformers.Trainer and all trainers of TRL. Raises InputError, one line, before the
    first step, if a parameter of the optimizer is not in the model. A sidecar that cannot be written is
    one warning, and training goes on.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_hyper_param_search:
            raise InputError(
                "ParamNamesCallback: a hyper-parameter search saves its trials in folders unknown to "
                "callbacks: use it in a single run"
            )
        param_names(args, state, kwargs["model"], kwargs["optimizer"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.should_save:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        with unharmed(f"{folder.name} has no {FILE}"):
            if not folder.is_dir():
                raise InputError(f"{folder}: the trainer reported it as saved, but it does not exist")
            content = param_names(args, state, kwargs["model"], kwargs["optimizer"])
            write_whole(folder / FILE, lambda target: write_json(content, target))


def param_names(
    args: TrainingArguments, state: TrainerState, model: Any, optimizer: Any
) -> dict[str, Any]:
    """The sidecar's content. InputError for a parameter of the optimizer that is not in the model."""
    optimizer, model = plain_optimizer(optimizer), policy_of(model)
    loss = _settings(args, LOSS)
    if "epsilon" in loss and loss.get("epsilon_high") is None:
        loss["epsilon_high"] = loss["epsilon"]  # as TRL resolves it
    if "router_aux_loss_coef" in loss:
        loss["router_aux_loss_coef"] = _router_coef(model, loss["router_aux_loss_coef"])
    return sidecar_content(
        optimizer,
        model,
        [package for package in PACKAGES if package in sys.modules],
        global_step=state.global_step,
        # 0 is off, as in the Trainer; so is an infinite bound.
        max_grad_norm=args.max_grad_norm if 0 < args.max_grad_norm < math.inf else 0.0,
        loss=loss,
        sampling=_settings(args, SAMPLING),
    )


def _router_coef(model: Any, given: float | None) -> float:
    """As TRL 1.16 resolves it: the architecture's own unless given; 0 for a model without router."""
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if given is None else given)


def _settings(args: TrainingArguments, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: _plain(getattr(args, key)) for key in keys if hasattr(args, key)}


def _plain(value: Any) -> Any:
    """As a JSON value: numbers, text, lists, objects; other types and infinity as their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _plain(value.tolist()) if isinstance(value, torch.Tensor) else str(value)
