"""Trainers whose steps can be recorded as rollouts, known before the first step."""

import importlib.metadata
import warnings
from collections.abc import Sequence
from typing import Any

from funcprobe.types import InputError


def require_recordable(trainer: Any, methods: Sequence[str]) -> None:
    """InputError, one line, for a trainer whose steps cannot be recorded; a warning of a router's loss.

    `methods` are those of TRL that a recorder uses.
    """
    for name in methods:
        if not callable(getattr(trainer, name, None)):
            raise other_trl(f"{type(trainer).__name__} has no {name}()")
    if getattr(trainer, "use_adaptive_entropy", False) and not hasattr(trainer, "_last_world_entropy"):
        raise other_trl("with use_adaptive_entropy the trainer has no _last_world_entropy")
    _require_text(trainer)
    _require_own_samples(trainer.args)
    if getattr(trainer, "aux_loss_enabled", False):
        warnings.warn(
            f"funcprobe: router_aux_loss_coef is {trainer.router_aux_loss_coef:g}: the step has a "
            "router's loss, which is no function of log-probabilities and entropies, so that a run on "
            "these rollouts leaves it out; set it to 0 for a step that can be predicted",
            stacklevel=3,
        )


def other_trl(what: str) -> InputError:
    """Of a trainer that is not TRL 1.16's: `what` differs."""
    return InputError(
        f"{what} (trl {importlib.metadata.version('trl')}): rollouts are recorded from the GRPOTrainer "
        "of trl 1.16; install that version, or write rollouts in the documented schema"
    )


def images() -> InputError:
    """Of rollouts that contain images."""
    return InputError(
        "the rollouts contain images, and only tokens can be recorded: train without images, or "
        "without record_rollouts"
    )


def _require_text(trainer: Any) -> None:
    """InputError for data with images, or tools of a model with vision, which may return some."""
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    vision = getattr(trainer, "_is_vlm", False)
    if {"image", "images"} & set(columns) or (vision and getattr(trainer, "tools", None)):
        raise images()


def _require_own_samples(args: Any) -> None:
    """InputError where a step may use responses of an earlier policy, unless by GRPO.

    TRL's RLOOTrainer, which has no loss_type, keeps the old log-probability of a sequence alone.
    """
    per_step = args.gradient_accumulation_steps
    per_generation = getattr(args, "steps_per_generation", per_step)
    iterations = getattr(args, "num_iterations", 1)
    if getattr(args, "loss_type", None) is None and per_step % (per_generation * iterations):
        raise InputError(
            f"num_iterations = {iterations}, steps_per_generation = {per_generation} and "
            f"gradient_accumulation_steps = {per_step}: this trainer has old log-probabilities of "
            "sequences, not of tokens; set num_iterations to 1, and the other two equal"
        )
