"""Recorded steps: what the trainer's loss was given, sequence by sequence, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from funcprobe.adapters import rollouts
from funcprobe.adapters.trainers import record_rollouts
from support.trainers import grpo_trainer, reward

# The calls of the loss.

SHORT = {"max_steps": 4, "per_device_train_batch_size": 8}


def calls_of_the_loss(trainer: GRPOTrainer) -> list[list[dict[str, Any]]]:
    """For every step, the tensors of each call, copied before TRL's own method gets them."""
    steps: list[list[dict[str, Any]]] = []
    compute = trainer._compute_loss

    def computing(model: Any, inputs: dict[str, Any]) -> Any:
        if trainer.model.training:
            steps.extend([] for _ in range(trainer.state.global_step + 1 - len(steps)))
            steps[-1].append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return compute(model, inputs)

    trainer._compute_loss = computing
    return steps


def require_recorded(file: Path, calls: list[dict[str, Any]], eos: int = 1) -> rollouts.Rollouts:
    """Every sequence of every call is in the file once, with all of its values to the last bit."""
    found = rollouts.load_rollouts(file, 14, rewards=False, advantages=True, eos_ids=(eos,))
    assert len(found.response_ids) == sum(len(call["completion_ids"]) for call in calls)
    seen = []
    for number, call in enumerate(calls):
        mask = call["completion_mask"] * call.get("tool_mask", 1)
        in_file = [i for i, m in enumerate(found.microbatch) if m == number]
        assert len(in_file) == len(mask)
        for j in range(len(mask)):
            prompt = call["prompt_ids"][j][call["prompt_mask"][j].bool()].tolist()
            padded = call["completion_ids"][j].tolist()
            response = padded[: padded.index(eos) + 1] if eos in padded else padded
            per_token = {
                name: call[key][j].tolist()
                for name, key in (
                    ("old_logp", "old_per_token_logps"),
                    ("ref_logp", "ref_per_token_logps"),
                )
                if key in call
            }
            for i in in_file:
                same = found.response_ids[i] == response and found.prompt_ids[i] == prompt
                if i not in seen and same and found.advantage[i] == float(call["advantages"][j]):
                    break
            else:
                pytest.fail(f"sequence {j} of micro-batch {number} is not in {file.name}")
            seen.append(i)
            n = len(response)
            assert found.loss_mask[i] == mask[j].bool().tolist()[:n]
            assert not mask[j][n:].any()
            for name in ("old_logp", "ref_logp"):
                assert (getattr(found, name) is not None) == (name in per_token)
                if name in per_token:
                    assert getattr(found, name)[i] == per_token[name][:n]
        assert found.generated_tokens == float(call["num_items_in_batch"])
    assert found.process == [0] * len(found.process)
    assert found.sampler_logp is None
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
        {"num_iterations": 2},
        {"num_iterations": 2, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4},
        {"mask_truncated_completions": True},
        {"beta": 0.04, "num_iterations": 3},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "num_iterations": 2},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()) or "plain",
)
def test_a_step_is_what_the_loss_was_given(settings, checkpoint, tmp_path):
    trainer = grpo_trainer(checkpoint, tmp_path, **(SHORT | settings))
    steps = calls_of_the_loss(trainer)
    record_rollouts(trainer, tmp_path / "rollouts")
    trainer.train()
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [file.name for file in files] == [f"step-{n:06d}.parquet" for n in range(1, 5)]
    assert [len(calls) for calls in steps] == [settings.get("gradient_accumulation_steps", 1)] * 4
    for number, (file, calls) in enumerate(zip(files, steps, strict=True), 1):
        found = require_recorded(file, calls)
        assert found.step == number
        assert found.entropy_coef == 0.0
        assert found.reward == pytest.approx(reward(found.response))
