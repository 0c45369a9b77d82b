"""Training goes on bit by bit as if it were not probed."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from transformers import (
    TrainerCallback,
)

import funcprobe
from funcprobe.adapters.trainers import ParamNamesCallback, ProbeCallback, live
from support.policies import tiny_policy
from support.slow import first
from support.trainers import TRAINERS, outcome, plain_trainer, probe_config, require_same

# Most of these trainers have dropout; test_dropout_in_training.py has the warning.
pytestmark = pytest.mark.filterwarnings("ignore:funcprobe. dropout in training:UserWarning")


@pytest.mark.parametrize("bf16", first(1, [False, True]))
@pytest.mark.parametrize("kind", TRAINERS)
def test_training_is_the_same_bit_by_bit(kind, bf16, checkpoint, tmp_path):
    off = outcome(TRAINERS[kind](checkpoint, tmp_path / "off", bf16=bf16))
    trainer = TRAINERS[kind](checkpoint, tmp_path / "on", bf16=bf16)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    trainer.add_callback(ParamNamesCallback())
    on = outcome(trainer)
    require_same(off, on)
    steps = trainer.state.global_step
    assert [entry["step"] for entry in on.probed] == list(range(1, steps + 1))
    for entry in on.probed:
        assert np.isfinite([v for v in entry.values() if v is not None]).all()
    assert on.logs  # the trainer's own logging goes on beside the probe's
    # The comparison sees what a probe could do: one number drawn from the global state.
    spoiled = TRAINERS[kind](checkpoint, tmp_path / "spoiled", bf16=bf16)
    spoiled.add_callback(_DrawsOneNumber())
    with pytest.raises(AssertionError):
        require_same(off, outcome(spoiled))


class _DrawsOneNumber(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        torch.rand(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_every_second_step_with_the_same_numbers(kind, checkpoint, tmp_path):
    found = []
    for every in (1, 2):
        trainer = TRAINERS[kind](checkpoint, tmp_path / str(every), max_steps=4)
        trainer.add_callback(ProbeCallback(trainer, every=every, config=probe_config(checkpoint)))
        found.append(outcome(trainer).probed)
    assert [entry["step"] for entry in found[1]] == [2, 4]
    assert found[1] == [entry for entry in found[0] if entry["step"] in {2, 4}]


def snapshot(model: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, by identity; containers with their content."""
    return {
        (name, key): (id(value), list(map(id, value.values())) if isinstance(value, dict) else value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


@pytest.mark.parametrize("raises", [False, True])
def test_at_rest_puts_everything_back(raises, checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1, bf16=True)
    trainer.train()  # accelerate has wrapped the forward, checkpointing is on
    model = trainer.model
    layers = model.get_base_model().model.layers
    layers[0].self_attn.eval()  # a mode of its own
    layers[1].compile(backend="eager")
    compiled = layers[1]._compiled_call_impl
    assert "_original_forward" in vars(model)
    hooks = model.get_input_embeddings()._forward_hooks
    assert len(hooks) > 1
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
    grads = {n: p.grad for n, p in model.named_parameters()}
    before, versions = snapshot(model), [p._version for p in model.parameters()]
    use_cache = model.config.use_cache
    draws = []
    for use in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        try:
            if use:
                with torch.autocast("cpu", torch.bfloat16), live.at_rest(model):
                    assert not torch.is_autocast_enabled("cpu")
                    assert not any(m.training for m in model.modules())
                    funcprobe.bind(model)  # refuses checkpointing, hooks and another forward
                    model.generate(input_ids=torch.tensor([[3, 4]]), do_sample=True, max_new_tokens=3)
                    random.random(), np.random.rand(), torch.rand(1)
                    1 // (not raises)
        except ZeroDivisionError:
            assert raises
        draws.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert draws[0] == draws[1]
    assert snapshot(model) == before
    assert layers[1]._compiled_call_impl is compiled is not None
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert model.config.use_cache == use_cache


def test_an_accelerators_random_state_is_put_back(monkeypatch):
    """Of its own kind, not CUDA's: as mps is, of which this machine has none."""
    model = tiny_policy(dtype=torch.float32)
    states = {0: torch.tensor([1], dtype=torch.uint8), 1: torch.tensor([2], dtype=torch.uint8)}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "device_count", lambda: 2)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(
        torch.mps, "set_rng_state", lambda state, device: states.__setitem__(device, state)
    )
    cpu = torch.get_rng_state()
    with live.at_rest(model):
        states[1] = torch.tensor([9], dtype=torch.uint8)
        torch.rand(1)
    assert {device: int(state) for device, state in states.items()} == {0: 1, 1: 2}
    assert torch.equal(torch.get_rng_state(), cpu)
