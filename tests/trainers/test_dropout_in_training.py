"""Dropout in a training: said by callback and recorder, and TRL's step within the masks' interval."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

import funcprobe
from funcprobe import Step, UpdateBatch, tree
from funcprobe.adapters import rollouts
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.adapters.trainers import ProbeCallback, record_rollouts
from funcprobe.statistics.intervals import Error, student
from support.slow import first
from support.trainers import LR, STEPS, grpo_trainer, probe_config


def warned(said: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in said if "dropout in training" in str(w.message)]


def test_the_callback_says_once_what_its_numbers_are_of(checkpoint, tmp_path) -> None:
    trainer = grpo_trainer(checkpoint, tmp_path, dropout=0.2, max_steps=2)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    (line,) = warned(said)
    assert "(lora_dropout = 0.2): each predicted step is by the trainer's own gradient" in line
    assert "no probe of its checkpoint can repeat" in line


@pytest.mark.parametrize(
    ("dropout", "settings", "count"),
    [(0.2, {}, 1), (0.0, {}, 0), (0.2, {"disable_dropout": True}, 0)],
)
def test_the_recorder_says_that_masks_are_not_recorded(
    dropout, settings, count, checkpoint, tmp_path
) -> None:
    trainer = grpo_trainer(checkpoint, tmp_path, dropout=dropout, **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record_rollouts(trainer, tmp_path)
    assert len(warned(said)) == count
    for line in warned(said):
        assert "(lora_dropout = 0.2): the step has random masks, which rollouts do not contain" in line


@pytest.mark.filterwarnings("ignore:funcprobe. dropout in training:UserWarning")
@pytest.mark.parametrize("dropout", first(1, [0.05, 0.3]))
def test_trls_step_lies_within_the_interval_of_the_masks(dropout, checkpoint, tmp_path) -> None:
    trainer = grpo_trainer(checkpoint, tmp_path, dropout=dropout)
    record_rollouts(trainer, tmp_path / "rollouts")
    trainer.train()
    before, after = (
        {
            name.replace(".weight", ".default.weight"): tensor.double()
            for name, tensor in load_file(
                tmp_path / f"checkpoint-{n}" / "adapter_model.safetensors"
            ).items()
        }
        for n in (STEPS - 1, STEPS)
    )
    taken = {name: (after[name] - before[name]) / (LR / STEPS) for name in before}
    place = tmp_path / f"checkpoint-{STEPS - 1}"
    policy = load_policy(PolicyConfig(checkpoint=str(place)), torch.device("cpu"))
    state, _ = read_adam_state(
        place / "optimizer.pt", policy.model, policy.params, accept_positional=True
    )
    file = tmp_path / "rollouts" / f"step-{STEPS:06d}.parquet"
    U = rollouts.load_rollouts(file, 14, rewards=True, advantages=True, eos_ids=policy.eos_ids)
    batch, advantage_N = rollouts.to_batch(U), torch.tensor(U.advantage, dtype=torch.float64)
    coef_NR = funcprobe.coefficients(advantage_N, batch.response_length_N, batch.prompt_N, "token_mean")
    probe = funcprobe.bind(policy.model)
    masks = funcprobe.masked_forwards(policy.model, probe.params, probe.forward, 8, seed=0)
    update = UpdateBatch(batch, coef_NR, batch.response_length_N.double())
    given, clip = (probe.params, batch, update, state), Step(max_grad_norm=1.0)
    found = probe.predict(*given, step=clip, masks=masks)
    plain = probe.predict(*given, step=clip)
    # Without masks v is far from the step, by much more than the 1e-4 of a run without dropout.
    off = tree.norm(tree.axpy(-1.0, taken, plain.direction.total)) / tree.norm(taken)
    assert 0.05 < off < 0.7
    assert found.masks is not None
    low, high = student(found.bars_dot, Error(found.masks.se, 7))
    assert low < tree.dot(found.X, taken) < high
    assert high - low < 4 * abs(found.bars_dot)
