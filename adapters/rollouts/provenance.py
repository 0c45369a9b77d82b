"""Whether a trainer's log belongs to the next step of the checkpoint, and is complete."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from funcprobe.types import InputError

from ..checkpoint.trainer_state import trained_steps
from ..config.schema import RolloutsConfig
from ..optimizer import Sidecar, find_sidecar
from .files import Columns
from .schema import Rollouts

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


def require_own(
    files: RolloutsConfig, E: Rollouts | None, U: Rollouts | None, run: TrainingRun
) -> list[str]:
    """Warnings on supplied batches: a step that cannot be checked, the same responses in both.

    InputError for a file of another step than the checkpoint's next.
    """
    lines = []
    for name, path, found in (("E", files.eval, E), ("U", files.update, U)):
        if found is not None:
            lines += _require_own_step(name, str(path), found, run)
    return lines + (_same_responses(E, U) if E and U else [])


def is_next_batch(update: Rollouts | None, run: TrainingRun) -> bool:
    """Whether U is the very batch of the checkpoint's next step: its step, and all its responses.

    With num_iterations over 1 only a recorded file is, which states the micro-batches of its step.
    """
    if update is None or update.step is None or run.steps is None or update.step != run.steps + 1:
        return False
    if run.loss.get("num_iterations") not in (None, 1) and update.microbatch is None:
        return False
    generated = run.loss.get("generation_batch_size")
    per_step, per_generation = (
        run.loss.get(key, 1) for key in ("gradient_accumulation_steps", "steps_per_generation")
    )
    if generated is None:
        return True
    if not all(type(count) is int for count in (generated, per_step, per_generation)):
        return False
    return bool(generated * per_step == len(update.response_ids) * per_generation)


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


def _require_own_step(name: str, path: str, found: Rollouts, run: TrainingRun) -> list[str]:
    """A warning where a file has a step and the checkpoint's is unknown.

    InputError unless the file is of the step that the checkpoint takes next, so that the policy sampled
    it; an E with its sampler's log-probabilities may be of any.
    """
    if found.step is None or (name == "E" and found.sampler_logp is not None):
        return []
    if run.steps is None:
        return [
            f"warning: {name} is of step {found.step}, but {run.checkpoint} does not record the number "
            f"of steps taken: it is of the next step only if these are {found.step - 1}"
        ]
    if found.step != run.steps + 1:
        drop = (
            "drop the column step to take that step's batch all the same"
            if name == "U"
            else "supply the column sampler_logp"
        )
        raise InputError(
            f"{path} is of step {found.step}, sampled after {found.step - 1} steps, but "
            f"{run.checkpoint} has taken {run.steps}: give the file of step {run.steps + 1}, or the "
            f"checkpoint that has taken {found.step - 1} steps; or {drop}"
        )
    return []


def _same_responses(E: Rollouts, U: Rollouts) -> list[str]:
    """A warning if the responses of one batch are all among the other's."""
    of_E, of_U = (
        Counter(zip(map(tuple, x.prompt_ids), map(tuple, x.response_ids), strict=True)) for x in (E, U)
    )
    if not (of_E <= of_U or of_U <= of_E):
        return []
    return [
        "warning: E and U are the same responses: v follows the noise of E, so that the prediction is "
        "biased, and the errors over E and over U are not independent, so that their total is not the "
        "error; supply different responses, or one of the two alone"
    ]
