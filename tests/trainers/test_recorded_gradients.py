"""The ring of gradients of a real GRPOTrainer: what the optimizer was given, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import funcprobe
from funcprobe import InputError
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.adapters.rollouts.gradients import (
    RecordedGradient,
    gradient_path,
    load_gradient,
    recorded_gradients,
    save_gradient,
)
from funcprobe.adapters.trainers import record_rollouts
from support.checkpoints import Checkpoint
from support.recorded import train_in_processes
from support.trainers import grpo_trainer, outcome, require_same

SHORT = {"max_steps": 4, "per_device_train_batch_size": 8, "save_steps": 2}


class Given(TrainerCallback):
    """What the optimizer is given and has, copied at each of its steps."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.steps.append(
            tuple({n: part(p).clone() for n, p in trained.items()} for part in (_grad, _value))
        )


def _grad(p: torch.Tensor) -> torch.Tensor:
    return p.grad


def _value(p: torch.Tensor) -> torch.Tensor:
    return p.detach()


def record(checkpoint: Checkpoint, folder: Path, count: int, **settings: Any):
    trainer = grpo_trainer(checkpoint, folder, **(SHORT | settings))
    record_rollouts(trainer, folder / "rollouts", gradients=count)
    return trainer, Given(trainer)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
)
def test_files_are_what_the_optimizer_was_given(settings, checkpoint, tmp_path):
    """Clipped or not, accumulated or not, to the last bit; only the last three of four steps stay."""
    trainer, given = record(checkpoint, tmp_path, 3, **settings)
    trainer.train()
    files = recorded_gradients(tmp_path / "rollouts")
    assert list(files) == [2, 3, 4]
    clip = settings["max_grad_norm"] or None
    norms = {}
    for step, path in files.items():
        gradient, params = given.steps[step - 1]
        found = load_gradient(path, params)
        assert (found.step, found.max_grad_norm) == (step, clip)
        for name in params:
            assert torch.equal(found.gradient[name], gradient[name])
            assert torch.equal(found.params[name], params[name])
        norms[step] = found.moment_norm
        if clip:
            assert funcprobe.tree.norm(found.gradient) == pytest.approx(clip, rel=1e-3)
    # The checkpoint after step 2 has those that led to it, of which the ring has deleted the first.
    assert list(recorded_gradients(tmp_path / "checkpoint-2" / "gradients")) == [1, 2]
    assert list(recorded_gradients(tmp_path / "checkpoint-4" / "gradients")) == [2, 3, 4]
    state, _ = read_adam_state(
        tmp_path / "checkpoint-2" / "optimizer.pt",
        trainer.model,
        funcprobe.trainable_params(trainer.model),
        accept_positional=True,
    )
    assert norms[3] == pytest.approx(funcprobe.tree.norm(state.exp_avg), rel=1e-12)
    assert not list((tmp_path / "rollouts").glob(".*"))


def test_a_resumed_training_continues_the_ring(checkpoint, tmp_path):
    """From checkpoint-2, other than before: the files of its steps 3 and 4 are those of the first."""
    trainer, _ = record(checkpoint, tmp_path, 3)
    trainer.train()
    before = {n: path.read_bytes() for n, path in recorded_gradients(tmp_path / "rollouts").items()}
    trainer, given = record(checkpoint, tmp_path, 3, learning_rate=1e-3, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    files = recorded_gradients(tmp_path / "rollouts")
    assert list(files) == [2, 3]
    assert len(given.steps) == 1
    assert files[2].read_bytes() == before[2]
    found = load_gradient(files[3], given.steps[0][1])
    name = next(iter(found.gradient))
    assert torch.equal(found.gradient[name], given.steps[0][0][name])


def test_training_is_the_same_bit_by_bit(checkpoint, tmp_path):
    off = outcome(grpo_trainer(checkpoint, tmp_path / "plain", **SHORT))
    trainer, _ = record(checkpoint, tmp_path / "recorded", 2)
    require_same(off, outcome(trainer))


def test_what_cannot_be_recorded_is_refused(checkpoint, tmp_path):
    trainer = grpo_trainer(checkpoint, tmp_path, **SHORT)
    for count in (0, -1, True, 2.0, "3"):
        with pytest.raises(InputError, match="a whole number of steps, at least 1, is expected"):
            record_rollouts(trainer, tmp_path, gradients=count)
    trainer, _ = record(checkpoint, tmp_path, 2, optim="sgd")
    with pytest.raises(InputError, match=r"SGD, whose step need not be AdamW's"):
        trainer.train()


@pytest.mark.slow
def test_one_process_writes_the_average(checkpoint, tmp_path):
    """Of two: the file is read, and its gradient moves theta as the checkpoint says."""
    settings = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 6, "max_grad_norm": 0.0}
    train_in_processes(checkpoint, tmp_path, gradients=2, **settings)
    files = recorded_gradients(tmp_path / "rollouts")
    assert list(files) == [1, 2]
    tensors = load_file(files[1])
    state = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    names = [n.removeprefix("gradient/") for n in tensors if n.startswith("gradient/")]
    assert len(names) == len(state)
    first = {tuple(sorted((0.1 * tensors[f"gradient/{n}"]).flatten().tolist())) for n in names}
    assert {tuple(sorted(x["exp_avg"].flatten().tolist())) for x in state.values()} == first


# Reading.

PARAMS = {"a": torch.ones(2, 3), "b": torch.ones(4)}
ONE = RecordedGradient(6, {n: 0.5 * t for n, t in PARAMS.items()}, PARAMS, 1.5, None)


def test_a_file_is_read_as_written(tmp_path):
    for clip in (None, 0.1):
        path = gradient_path(tmp_path / "new", 6)
        save_gradient(ONE._replace(max_grad_norm=clip), path)
        found = load_gradient(path, PARAMS)
        assert (found.step, found.moment_norm, found.max_grad_norm) == (6, 1.5, clip)
        assert all(torch.equal(found.gradient[n], ONE.gradient[n]) for n in PARAMS)
    (tmp_path / "new" / "step-6.safetensors").touch()
    (tmp_path / "new" / "step-000007.parquet").touch()
    assert recorded_gradients(tmp_path / "new") == {6: path}
    assert recorded_gradients(tmp_path / "none") == {}


def damage(path: Path, **metadata: str) -> None:
    whole = {
        "format": "funcprobe gradients 1",
        "step": "6",
        "moment_norm": "1",
        "max_grad_norm": "none",
    }
    save_file(load_file(path), path, whole | metadata)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-8]), "cannot be read .*: copy it again, or delete"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
        (lambda p: damage(p, format="\x1b[2J"), r"format '\\x1b\[2J' in its metadata, \"funcpr"),
        (lambda p: save_file(load_file(p), p), "has format None in its metadata"),
        (lambda p: damage(p, step="six"), "has damaged metadata .*six.*: copy it again"),
        (lambda p: damage(p, step="7"), "is of step 7 by its metadata: rename it"),
        (lambda p: damage(p, moment_norm="nan"), "has moment_norm nan and max_grad_norm None"),
        (lambda p: damage(p, max_grad_norm="-1"), r"max_grad_norm -1\.0 in its metadata"),
        (
            lambda p: save_gradient(ONE._replace(gradient={"a": PARAMS["a"]}), p),
            "gradient of the step: names do not match: missing b, .* had no gradient in that step",
        ),
        (
            lambda p: save_gradient(ONE._replace(gradient=PARAMS | {"b": torch.ones(5)}), p),
            r"gradient of the step: b has shape \(5,\), expected \(4,\): it is of another adapter",
        ),
        (
            lambda p: save_gradient(ONE._replace(params=PARAMS | {"c": torch.ones(5)}), p),
            "parameters of the step: names do not match: missing none, unexpected c",
        ),
        (
            lambda p: save_gradient(ONE._replace(gradient=PARAMS | {"b": PARAMS["b"] / 0}), p),
            "the gradient of b are not finite in 1 of 2 tensors",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(change, said, tmp_path):
    path = gradient_path(tmp_path, 6)
    save_gradient(ONE, path)
    change(path)
    with pytest.raises(InputError, match=said) as refused:
        load_gradient(path, PARAMS)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)
