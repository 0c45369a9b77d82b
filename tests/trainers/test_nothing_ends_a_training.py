"""Whatever fails beside a training is one warning, and the training is that without it, bit by bit."""

import errno
import gc
import logging
import random
import shutil
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from funcprobe import InputError
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.trainers import (
    ParamNamesCallback,
    ProbeCallback,
    gradients,
    live,
    names,
    probe,
    record_rollouts,
    recording,
)
from funcprobe.adapters.trainers.unharmed import unharmed
from support.checkpoints import Checkpoint
from support.slow import first
from support.trainers import grpo_trainer, outcome, plain_trainer, probe_config, require_same

pytestmark = pytest.mark.filterwarnings("ignore:funcprobe. dropout in training:UserWarning")

FULL = OSError(errno.ENOSPC, "No space left on device", "/full/disk")

# Where it fails: the name in probe.py, or in a module that it calls; what is raised; what is said.
STAGES: list[tuple[Any, str, Exception, str]] = [
    (probe, "together", RuntimeError("Connection closed by peer"), "RuntimeError: Connection closed"),
    (probe, "live_policy", KeyError("lora_A"), "KeyError: 'lora_A'"),
    (probe, "adam_state", TypeError("no state"), "TypeError: no state"),
    (probe, "ascent", MemoryError(), "MemoryError"),
    (probe, "_direction", ZeroDivisionError("division by zero"), "ZeroDivisionError: division by"),
    (probe, "lr_now", StopIteration(), "StopIteration"),
    (probe, "at_rest", AttributeError("no base"), "AttributeError: no base"),
    (live, "random_state_kept", ValueError("no device"), "ValueError: no device"),
    (probe, "draw_with_replacement", FULL, "OSError: [Errno 28] No space left on device: '/full"),
    (probe, "sample_responses", RecursionError("too deep"), "RecursionError: too deep"),
    (probe.funcprobe, "collate", IndexError("no row"), "IndexError: no row"),
    (probe.funcprobe, "frozen_forward", InputError("not\nfinite"), "not finite"),
    (probe, "size_of", torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory. Tr"),
    (probe, "eval_passes", RuntimeError("a kernel's bug"), "RuntimeError: a kernel's bug"),
    (probe, "summarise_along", AssertionError(), "AssertionError"),
    (probe.funcprobe, "measure", UnicodeError("half a pair"), "UnicodeError: half a pair"),
    (probe, "delta_error", ArithmeticError("variance"), "ArithmeticError: variance"),
    (probe, "numbers", LookupError("no digits"), "LookupError: no digits"),
    (probe, "headline", ImportError("no words"), "ImportError: no words"),
    (probe.logger, "info", BrokenPipeError(errno.EPIPE, "Broken pipe"), "BrokenPipeError: [Errno 32]"),
]


def small(checkpoint: Checkpoint) -> Config:
    """Of a probe that takes little time: passes of a few microbatches, without trials of their size."""
    return probe_config(checkpoint, sampling={"B_E": 4}, run={"max_tokens": 24})


def held(trainer: Trainer) -> dict[Any, Any]:
    """Every attribute of every module and every gradient, by identity; containers by their content."""
    of_modules = {
        (name, key): (id(value), list(map(id, value.values())) if isinstance(value, dict) else value)
        for name, module in trainer.model.named_modules()
        for key, value in vars(module).items()
    }
    of_params = {
        name: (p.requires_grad, id(p.grad), p._version, None if p.grad is None else p.grad._version)
        for name, p in trainer.model.named_parameters()
    }
    random_states = {"python": random.getstate(), "numpy": repr(np.random.get_state())}
    modes = {"autocast": torch.is_autocast_enabled("cpu"), "grad": torch.is_grad_enabled()}
    return of_modules | of_params | random_states | modes | {"torch": torch.get_rng_state().tolist()}


class Failing(TrainerCallback):
    """Step n fails at the n-th stage; added before the probe, so that it is in place by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> None:
        self.monkeypatch, self.called, self.trainer = monkeypatch, [0] * len(STAGES), trainer
        self.before: dict[Any, Any] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = held(self.trainer)
        if state.global_step >= len(STAGES):
            return
        module, name, error, _ = STAGES[state.global_step]

        def fail(*_: Any, **__: Any) -> Any:
            self.called[state.global_step] += 1
            raise error

        self.monkeypatch.setattr(module, name, fail)

    def on_step_end(self, args, state, control, **kwargs):
        self.monkeypatch.undo()


class AsBefore(TrainerCallback):
    """Added after the probe: all that the model holds is what it held before it."""

    def __init__(self, failing: Failing) -> None:
        self.failing, self.same = failing, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.same.append(held(self.failing.trainer) == self.failing.before)


def said_by(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What it returns, and what funcprobe warns of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = work()
    lines = [str(w.message) for w in said if str(w.message).startswith("funcprobe:")]
    return found, [line for line in lines if "dropout in training" not in line]


@pytest.mark.slow
def test_each_stage_of_a_probe_may_fail(checkpoint, tmp_path, monkeypatch) -> None:
    steps = len(STAGES) + 1
    without = outcome(plain_trainer(checkpoint, tmp_path / "off", max_steps=steps, bf16=True))
    on = plain_trainer(checkpoint, tmp_path / "on", max_steps=steps, bf16=True)
    failing = Failing(monkeypatch, on)
    as_before = AsBefore(failing)
    on.add_callback(failing)
    on.add_callback(ProbeCallback(on, every=1, config=small(checkpoint)))
    on.add_callback(as_before)
    found, said = said_by(lambda: outcome(on))
    assert failing.called == [1] * len(STAGES)
    require_same(without, found)
    assert as_before.same == [True] * steps
    said = [line for line in said if "half precision" not in line and "rounding" not in line]
    assert len(said) == len(STAGES)
    for step, (line, (*_, reason)) in enumerate(zip(said, STAGES, strict=True), 1):
        assert line.startswith(f"funcprobe: step {step} is not probed: {reason}")
        assert "\n" not in line
    assert [e.get("funcprobe/skipped") for e in found.probed] == [1] * len(STAGES) + [None]
    assert found.probed[-1]["funcprobe/predicted"] != 0  # the next one tries again


@pytest.mark.parametrize(("name", "at"), first(1, [("eval_passes", 4), ("measure", 2)]))
def test_a_pass_may_fail_inside_of_the_model(name, at, checkpoint, tmp_path, monkeypatch) -> None:
    """Within torch.func's transforms, at the n-th call of a layer in the passes of the first probe."""
    without = outcome(plain_trainer(checkpoint, tmp_path / "off", max_steps=2))
    trainer = plain_trainer(checkpoint, tmp_path / "on", max_steps=2)
    layer, calls = trainer.model.get_base_model().model.layers[1].mlp, []
    plain, owner = layer.forward, probe if name == "eval_passes" else probe.funcprobe
    whole, inside = getattr(owner, name), []

    def passes(*given: Any, **named: Any) -> Any:
        inside.append(1)
        try:
            return whole(*given, **named)
        finally:
            inside.clear()

    monkeypatch.setattr(owner, name, passes)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if inside:
            calls.append(1)
            if len(calls) == at:
                raise RuntimeError("a bug inside")
        return plain(x)

    trainer.add_callback(ProbeCallback(trainer, every=1, config=small(checkpoint)))

    class Put(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            layer.forward = forward  # after the examination before the first step

        def on_step_end(self, args, state, control, **kwargs):
            del layer.forward

    trainer.add_callback(Put())
    found, said = said_by(lambda: outcome(trainer))
    require_same(without, found)
    assert len(calls) > at
    assert len(said) == 1
    assert said[0].startswith("funcprobe: step 1 is not probed: ")
    assert "RuntimeError: a bug inside" in said[0]
    assert found.probed[1]["funcprobe/predicted"] != 0


def test_a_log_that_fails_is_said_and_the_others_have_the_numbers(checkpoint, tmp_path) -> None:
    without = outcome(plain_trainer(checkpoint, tmp_path / "off", max_steps=2))
    trainer = plain_trainer(checkpoint, tmp_path / "on", max_steps=2)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=small(checkpoint)))

    class Sink(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step == 1:
                raise ConnectionError("no such project")

    trainer.add_callback(Sink())
    found, said = said_by(lambda: outcome(trainer))
    require_same(without, found)
    line = "funcprobe: step 1: funcprobe/* is not in every log: ConnectionError: no such project"
    assert said == [line]
    assert len(found.probed) == 2


def test_a_probe_that_was_not_examined_is_tried_all_the_same(checkpoint, tmp_path, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=small(checkpoint)))
    with monkeypatch.context() as patch:
        patch.setattr(probe.funcprobe, "bind", fail)
        found, said = said_by(lambda: outcome(trainer))
    assert said == ["funcprobe: the trainer was not examined before the first step: CUDA out of memory"]
    assert found.probed[0]["funcprobe/predicted"] != 0


def test_an_interruption_is_the_users(checkpoint, tmp_path, monkeypatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=small(checkpoint)))
    monkeypatch.setattr(probe, "eval_passes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(m.training for m in trainer.model.modules())


def test_memory_of_a_failure_is_free_at_once_and_warnings_may_be_errors(caplog) -> None:
    class Large:
        pass

    held: list[weakref.ref[Large]] = []

    def deeper() -> None:
        large = Large()
        held.append(weakref.ref(large))
        kept = [large]
        try:
            1 // (not large)
        except ZeroDivisionError as error:
            kept.append(error)  # a cycle, which only the collector finds
            raise ValueError("outer") from error

    gc.disable()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            with unharmed("it is lost") as attempt:
                deeper()
        assert held[0]() is None
    finally:
        gc.enable()
    assert attempt.reason == "ValueError: outer"
    assert caplog.messages == ["funcprobe: it is lost: ValueError: outer"]


RECORDING: list[tuple[Any, str, Exception]] = [
    (recording._Recorder, "_keep", KeyError("prompt_ids")),
    (recording._Recorder, "_rollouts", TypeError("no rows")),
    (recording, "save_rollouts", FULL),
    (recording, "write_whole", PermissionError(errno.EACCES, "Permission denied")),
    (gradients, "save_gradient", FULL),
    (gradients, "adam_state", RuntimeError("no state")),
    (gradients.GradientRing, "_delete", PermissionError(errno.EACCES, "Permission denied")),
]


@pytest.mark.slow
def test_each_part_of_a_recording_may_fail(checkpoint, tmp_path, monkeypatch) -> None:
    """One warning a step, no file of it, those of the other steps, and the same training."""
    settings = {"max_steps": len(RECORDING) + 2, "per_device_train_batch_size": 8, "save_steps": 100}
    without = outcome(grpo_trainer(checkpoint, tmp_path / "off", **settings))
    trainer = grpo_trainer(checkpoint, tmp_path / "on", **settings)
    record_rollouts(trainer, tmp_path / "rollouts", gradients=20)

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            place = state.global_step - 1  # the first step is as it should be
            if 0 <= place < len(RECORDING):
                owner, name, error = RECORDING[place]
                monkeypatch.setattr(owner, name, _raising(error))

        def on_step_end(self, args, state, control, **kwargs):
            monkeypatch.undo()

    trainer.add_callback(Break())
    found, said = said_by(lambda: outcome(trainer))
    require_same(without, found)
    rows = {step for step in range(1, 10) if (tmp_path / f"rollouts/step-{step:06d}.parquet").exists()}
    made = {
        step for step in range(1, 10) if (tmp_path / f"rollouts/step-{step:06d}.safetensors").exists()
    }
    assert rows == {1, 6, 7, 8, 9}
    assert made == {1, 2, 3, 4, 5, 8, 9}  # the last failure was after its file
    lost = [f"funcprobe: step {step} is not recorded: " for step in (2, 3, 4, 5)]
    lost += [f"funcprobe: the gradient of step {step} is not recorded: " for step in (6, 7, 8)]
    assert len(said) == len(lost)
    assert all(line.startswith(start) for line, start in zip(said, lost, strict=True))
    assert not [file for file in (tmp_path / "rollouts").iterdir() if file.name.startswith(".")]


def _raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_a_generation_that_cannot_be_recorded_loses_its_steps_alone(
    checkpoint, tmp_path, monkeypatch
) -> None:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "steps_per_generation": 2}
    settings |= {"gradient_accumulation_steps": 1, "save_steps": 100}
    without = outcome(grpo_trainer(checkpoint, tmp_path / "off", **settings))
    trainer = grpo_trainer(checkpoint, tmp_path / "on", **settings)
    record_rollouts(trainer, tmp_path / "rollouts")
    whole, count = recording._Recorder._generation, []

    def second(self: Any, output: Any) -> Any:
        count.append(1)
        if len(count) == 2:
            raise InputError("another kind of output")
        return whole(self, output)

    monkeypatch.setattr(recording._Recorder, "_generation", second)
    found, said = said_by(lambda: outcome(trainer))
    require_same(without, found)
    assert len(count) == 3
    reason = "is not recorded: its generation was not: another kind of output"
    assert said == [f"funcprobe: step {step} {reason}" for step in (3, 4)]
    files = sorted(file.name for file in (tmp_path / "rollouts").iterdir())
    assert files == [f"step-{step:06d}.parquet" for step in (1, 2, 5, 6)]


def test_a_reward_that_raises_ends_the_training_as_without_a_recorder(checkpoint, tmp_path) -> None:
    def raises(completions: Any, **_: Any) -> Any:
        raise ZeroDivisionError("the user's own")

    trainer = grpo_trainer(checkpoint, tmp_path, rewards=raises, max_steps=1)
    record_rollouts(trainer, tmp_path / "rollouts")
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        trainer.train()


def test_a_folder_that_is_deleted_is_made_again_and_one_that_cannot_be_is_said(
    checkpoint, tmp_path, monkeypatch
) -> None:
    trainer = grpo_trainer(checkpoint, tmp_path / "out", max_steps=3, save_steps=2)
    record_rollouts(trainer, tmp_path / "rollouts", gradients=2)
    trainer.add_callback(ParamNamesCallback())
    fail = _raising(FULL)
    monkeypatch.setattr(names, "write_json", fail)
    monkeypatch.setattr(gradients, "_link", fail)

    class Deletes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                shutil.rmtree(tmp_path / "rollouts")

    trainer.add_callback(Deletes())
    _, said = said_by(trainer.train)
    assert {file.name for file in (tmp_path / "rollouts").iterdir()} == {
        *(f"step-{step:06d}.{kind}" for step in (2, 3) for kind in ("parquet", "safetensors"))
    }
    assert [line.partition(": [Errno")[0] for line in said] == [
        f"funcprobe: checkpoint-{step} {what}: OSError"
        for step in (2, 3)
        for what in ("has not all of the recorded gradients", "has no optimizer_param_names.json")
    ]
