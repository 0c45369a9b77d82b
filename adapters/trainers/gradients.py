"""The last K steps' gradients in a ring of files, with each checkpoint those that led to it."""

# ruff: noqa: ARG002  (the arguments are the trainer's)
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from funcprobe import tree
from funcprobe.policy.forward import trainable_params
from funcprobe.types import InputError

from ..rollouts.gradients import (
    FOLDER,
    RecordedGradient,
    gradient_path,
    recorded_gradients,
    save_gradient,
)
from ..store import write_whole
from .live import adam_state, plain_optimizer, policy_of, require_live
from .unharmed import unharmed


def require_count(gradients: Any) -> None:
    """InputError unless it is a whole number of steps, or None for none."""
    if gradients is None:
        return
    if isinstance(gradients, bool) or not isinstance(gradients, int) or gradients < 1:
        raise InputError(
            f"gradients = {gradients!r}: a whole number of steps, at least 1, is expected, or None"
        )


class GradientRing(TrainerCallback):
    """Writes what each optimizer step is made from, and deletes the files of more than K steps ago.

    Gradients are accumulated, averaged over processes and clipped before on_pre_optimizer_step
    (transformers 5.23), which is what the optimizer is given. One process writes. What cannot be
    written is one warning, and training goes on.
    """

    def __init__(self, trainer: Any, folder: Path, count: int) -> None:
        self.trainer, self.folder, self.count = trainer, folder, count

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_live(self.trainer, plain_optimizer(kwargs["optimizer"]))
        if state.is_world_process_zero:
            with unharmed("gradients of another training that went on from here are still there"):
                self._delete(lambda step: step > state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        step = state.global_step + 1
        with unharmed(f"the gradient of step {step} is not recorded"):
            self._write(step, args, plain_optimizer(kwargs["optimizer"]))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The ring's files in the checkpoint, too, where no later step deletes them."""
        if not args.should_save:
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        with unharmed(f"{name} has not all of the recorded gradients"):
            for file in recorded_gradients(self.folder).values():
                write_whole(
                    Path(str(args.output_dir)) / name / FOLDER / file.name, partial(_link, file)
                )

    def _write(self, step: int, args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
        model = policy_of(self.trainer.model)
        params = trainable_params(model)
        gradient = {
            n: p.grad for n, p in model.named_parameters() if n in params and p.grad is not None
        }
        found = RecordedGradient(
            step=step,
            gradient=gradient,
            params=params,
            moment_norm=tree.norm(adam_state(optimizer, model, params).exp_avg),
            max_grad_norm=args.max_grad_norm if 0 < args.max_grad_norm < math.inf else None,
        )
        save_gradient(found, gradient_path(self.folder, step))
        self._delete(lambda of: of <= step - self.count)

    def _delete(self, is_old: Callable[[int], bool]) -> None:
        for step, file in recorded_gradients(self.folder).items():
            if is_old(step):
                file.unlink()


def _link(source: Path, target: Path) -> None:
    """The same file under another name, without a copy where the file system can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
