"""Whether a trainer's log belongs to the next step of the checkpoint, and is complete."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from funcprobe.types import InputError

from ..checkpoint.trainer_state import trained_steps
from ..optimizer import Sidecar, find_sidecar
from .files import Columns

Layout: TypeAlias = Literal["trl", "verl"]

TITLES: dict[Layout, str] = {"trl": "TRL completions", "verl": "a verl rollout dump"}


class TrainingRun(NamedTuple):
    """What a checkpoint records of its training run; empty or None if it does not."""

    checkpoint: Path
    steps: int | None  # optimizer steps taken
    loss: Mapping[str, Any]  # settings, by TRL's names
    sampling: Mapping[str, Any]


def training_run(checkpoint: Path, sidecar: Sidecar | None) -> TrainingRun:
    """From trainer_state.json and the sidecar, by default the one in the checkpoint.

    InputError if either is damaged.
    """
    if sidecar is None and checkpoint.is_dir():
        sidecar = find_sidecar(checkpoint)
    steps = trained_steps(checkpoint)
    if sidecar is None:
        return TrainingRun(checkpoint, steps, {}, {})
    steps = sidecar.global_step if steps is None else steps
    return TrainingRun(checkpoint, steps, sidecar.loss, sidecar.sampling)


def require_next_step(file: Columns, layout: Layout, run: TrainingRun) -> list[str]:
    """A warning if the checkpoint's step is unknown.

    The rollouts of step N + 1 are sampled from checkpoint-N and make the step that is predicted.
    InputError for those of another step, of several steps, or (TRL's) more or fewer than the run
    sampled for one step.
    """
    step = _step(file)
    if layout == "trl":
        _require_one_step(file, run)
    if run.steps is None:
        return [
            f"warning: U's file is of step {step}, but {run.checkpoint} does not record the number of "
            f"steps taken: the file is of the next step only if these are {step - 1}"
        ]
    if step != run.steps + 1:
        name = (
            f"completions_{run.steps + 1:05d}.parquet" if layout == "trl" else f"{run.steps + 1}.jsonl"
        )
        raise InputError(
            f"{file.path} is of step {step}, but {run.checkpoint} has taken {run.steps} steps, so that "
            f"its next step uses the rollouts of step {run.steps + 1}: give {name}, or the checkpoint "
            f"that has taken {step - 1} steps"
        )
    return []


def length_lines(run: TrainingRun, max_new_tokens: int) -> list[str]:
    """A warning if the run cut responses off at another length."""
    longest = run.sampling.get("max_completion_length")
    if longest in (None, max_new_tokens):
        return []
    return [
        f"warning: the run's max_completion_length was {longest}, sampling.max_new_tokens is "
        f"{max_new_tokens}: responses are cut off at another length than in the run"
    ]


def _require_one_step(file: Columns, run: TrainingRun) -> None:
    loss, rows = run.loss, len(file.place)
    per_step, generated = loss.get("gradient_accumulation_steps"), loss.get("steps_per_generation")
    iterations = loss.get("num_iterations")
    remedy = "record the tokens of each step instead (record_rollouts, docs/rollouts.md)"
    if None not in (per_step, generated) and per_step != generated:
        raise InputError(
            f"{file.path} contains a generation of {generated} micro-batches (steps_per_generation), "
            f"but a step of this run takes {per_step} (gradient_accumulation_steps): {remedy}"
        )
    if iterations not in (None, 1):
        raise InputError(
            f"{file.path} contains a generation that this run used num_iterations = {iterations} "
            f"times, mostly off-policy: {remedy}"
        )
    expected = loss.get("generation_batch_size")
    if expected not in (None, rows):
        raise InputError(
            f"{file.path} has {rows} rows, but the run generated {expected} per step "
            f"(generation_batch_size): rows are missing, or are not of this step; {remedy}"
        )


def _step(file: Columns) -> int:
    steps = file.values["step"]
    for place, step in zip(file.place, steps, strict=True):
        if type(step) is not int:
            raise InputError(f"{file.path}: {place} has {step!r:.60} in step, an integer is expected")
        if step != steps[0]:
            raise InputError(
                f"{file.path} contains steps {steps[0]} and {step}, two policies: keep the rows of one"
            )
    return int(steps[0])
