"""The acceptance test of the checkpoint readers: TRL's own next step, from what it left on disk.

TRL takes step 6 while its rollouts are recorded; from checkpoint-5 and these rollouts the direction
must be (theta_6 - theta_5) / lr, tensor by tensor.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

import funcprobe
from funcprobe import UpdateBatch, tree
from funcprobe.adapters import rollouts
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.adapters.stages import differences
from funcprobe.adapters.trainers import ParamNamesCallback, names, record_rollouts
from funcprobe.step.adam import UpdateDirection
from support.checkpoints import Checkpoint, sets
from support.trainers import LR, STEPS, grpo_trainer, reward


def right(completions, answer, **_):
    """1 where the sum is right, and a little for being short."""
    return [float(text == a) - len(text) / 100 for text, a in zip(completions, answer, strict=True)]


class Trained(NamedTuple):
    """A run of six steps, of which the last was recorded."""

    trainer: GRPOTrainer
    before: Path  # checkpoint-5
    rollouts: Path  # of step 6
    lr: float  # of step 6
    taken: dict[str, torch.Tensor]  # (theta_6 - theta_5) / lr, by the registry's names


def train(checkpoint: Checkpoint, folder: Path, **settings: Any) -> Trained:
    trainer = grpo_trainer(checkpoint, folder, **settings)
    trainer.add_callback(ParamNamesCallback())
    record_rollouts(trainer, folder / "rollouts")
    trainer.train()
    before, after = (
        {
            name.replace(".weight", ".default.weight"): tensor.double()
            for name, tensor in load_file(
                folder / f"checkpoint-{n}" / "adapter_model.safetensors"
            ).items()
        }
        for n in (STEPS - 1, STEPS)
    )
    lr = LR / STEPS
    taken = {name: (after[name] - before[name]) / lr for name in before}
    file = folder / "rollouts" / f"step-{STEPS:06d}.parquet"
    return Trained(trainer, folder / f"checkpoint-{STEPS - 1}", file, lr, taken)


def require_equal(found: funcprobe.Params, taken: funcprobe.Params) -> None:
    """The bounds of the acceptance test; `pytest -s` shows the figures."""
    assert found.keys() == taken.keys()
    error = {n: float((found[n].double() - v).norm() / v.norm()) for n, v in taken.items()}
    cosine = tree.dot(found, taken) / tree.norm(found) / tree.norm(taken)
    print(f"largest relative error {max(error.values()):.2g}, 1 - cosine {1 - cosine:.2g}")
    assert max(error.values()) < 1e-4, error
    assert cosine > 0.999999


# bnpo, one mean over the tokens of a micro-batch, is dapo's where there is one micro-batch only.
LOSSES = {
    "dapo": ("dapo", "group", "dapo"),
    "grpo": ("grpo", "group", "grpo"),
    "dr_grpo": ("dr_grpo", "none", "dr_grpo"),
    "bnpo": ("bnpo", "group", "dapo"),
    "gspo": ("grpo", "group", "grpo"),  # with one ratio for a sequence, which is 1 here as well
}


@pytest.mark.parametrize(
    ("loss", "accumulation", "max_grad_norm", "temperature"),
    [
        # Clipping hides a wrong factor in the gradient, so that each loss is tried without it.
        ("dapo", 1, 0.0, 1.0),
        ("dapo", 2, 0.0, 0.7),
        ("dapo", 2, 0.05, 1.0),
        ("grpo", 2, 0.0, 1.0),
        ("dr_grpo", 2, 0.0, 1.0),
        ("dr_grpo", 1, 0.05, 1.3),
        ("bnpo", 1, 0.0, 1.0),
        ("gspo", 2, 0.0, 1.0),
    ],
)
def test_next_step_is_the_one_trl_takes(
    loss, accumulation, max_grad_norm, temperature, checkpoint, tmp_path
):
    loss_type, scale_rewards, preset = LOSSES[loss]
    run = train(
        checkpoint,
        tmp_path,
        loss_type=loss_type,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        scale_rewards=scale_rewards,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=16 // accumulation,
        max_grad_norm=max_grad_norm,
        temperature=temperature,
    )
    policy = load_policy(PolicyConfig(checkpoint=str(run.before)), torch.device("cpu"))
    adam_state, report = read_adam_state(run.before / "optimizer.pt", policy.model, policy.params)
    assert report.coverage == dict.fromkeys(("exp_avg_sq", "exp_avg", "step"), len(policy.params))
    assert adam_state.groups[0].lr == pytest.approx(run.lr)
    U = rollouts.load_rollouts(run.rollouts, 14, rewards=True, advantages=True, eos_ids=policy.eos_ids)
    assert temperature == U.temperature
    batch = rollouts.to_batch(U)
    assert len(set(map(len, U.response_ids))) > 2  # else padding and normalisation are not tried
    objective = funcprobe.PRESETS[preset]._replace(constant=6.0)
    advantage_N = torch.tensor(U.advantage, dtype=torch.float64)
    ours_N = funcprobe.advantages(
        torch.tensor(U.reward, dtype=torch.float64), batch.prompt_N, objective.advantage
    )
    # TRL's are float32, of rewards up to 2.
    torch.testing.assert_close(ours_N, advantage_N, rtol=1e-5, atol=1e-5)

    probe = funcprobe.bind(policy.model, temperature=temperature)

    def direction(normalisation: str, clip: float | None) -> UpdateDirection:
        coef_NR = funcprobe.coefficients(
            advantage_N, batch.response_length_N, batch.prompt_N, normalisation, objective.constant
        )
        Y = probe.grad_Y(probe.params, UpdateBatch(batch, coef_NR))
        return funcprobe.update_direction(probe.params, Y, adam_state, max_grad_norm=clip)

    v = direction(objective.normalisation, max_grad_norm or None)
    assert (v.clip_coefficient < 0.9) == (max_grad_norm > 0)
    require_equal(v.total, run.taken)
    # What the comparison must be able to see: another normalisation, and the clipping.
    others = [(n, max_grad_norm or None) for n in ("sequence_mean", "token_mean", "sequence")]
    others = [(n, clip) for n, clip in others if n != objective.normalisation and not clip]
    others += [(objective.normalisation, None)] if max_grad_norm else []
    for normalisation, clip in others:
        with pytest.raises(AssertionError):
            require_equal(direction(normalisation, clip).total, run.taken)


@pytest.mark.slow
def test_run_with_recorded_rollouts_writes_trls_step(checkpoint, command, tmp_path):
    """Loss, temperature, L and clipping are the run's own, from its sidecar."""
    run = train(
        checkpoint,
        tmp_path / "training",
        loss_type="dr_grpo",
        scale_rewards="none",
        temperature=0.7,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=8,
        max_grad_norm=0.05,
    )
    config = tmp_path / "probe.toml"
    config.write_text("")
    settings = {
        "policy.checkpoint": str(run.before),
        "rollouts.update": str(run.rollouts),
        "objective.advantage": "rollouts",
        "prompts.source": str(checkpoint.prompts),
        "sampling.B_E": 16,
        "run.device": "cpu",
    }
    outcome = command("run", config, "-v", *sets(settings))
    assert outcome.status == 0, outcome.err
    v = load_file(tmp_path / "runs" / "probe" / "direction.safetensors")
    require_equal(v, run.taken)
    # max_grad_norm is known from what ParamNamesCallback wrote, lr from optimizer.pt.
    clipped = re.search(r"clip coefficient ([\d.]+)", outcome.flat)
    assert clipped
    assert float(clipped[1]) < 0.9
    assert f"({run.lr:g})" in outcome.out or f"lr {run.lr:g})" in outcome.out
    # U is the step's own batch: v is known, and the error is that over E alone.
    first = json.loads((tmp_path / "runs" / "probe" / "results.json").read_text())["first_order"]
    assert first["se_over_U"]["value"] == 0
    assert "the next step itself" in first["se_over_U"]["normalised_by"]
    assert first["se_total"]["value"] == first["se_given_U"]["value"]
    assert "U is the step's own batch" in outcome.flat
    # Of another step, U and E are rejected; E as well as U of the right one is pointed out.
    for which in ("rollouts.update", "rollouts.eval"):
        wrong = settings | {which: str(run.rollouts.with_name("step-000003.parquet"))}
        outcome = command("run", config, "--dry-run", *sets(wrong))
        assert (outcome.status, outcome.out) == (2, "")
        assert "step-000003.parquet is of step 3" in outcome.err.splitlines()[-1]
    both = settings | {"rollouts.eval": str(run.rollouts)}
    outcome = command("run", config, "--dry-run", *sets(both))
    assert outcome.status == 0, outcome.err
    assert "warning: E and U are the same responses" in outcome.err


@pytest.mark.slow
def test_a_step_without_gradient_is_the_one_trl_takes(checkpoint, command, tmp_path):
    """Equal rewards in the last step alone: TRL steps all the same, by momentum and weight decay."""
    batches = []

    def equal_at_last(completions, **_):
        batches.append(len(completions))
        return [0.5] * len(completions) if len(batches) == STEPS else reward(completions)

    run = train(checkpoint, tmp_path / "training", rewards=equal_at_last)
    assert all(t.any() for t in run.taken.values())
    (tmp_path / "probe.toml").write_text("")
    settings = {
        "policy.checkpoint": str(run.before),
        "rollouts.update": str(run.rollouts),
        "prompts.source": str(checkpoint.prompts),
        "sampling.B_E": 16,
        "sampling.max_new_tokens": 6,
        "run.device": "cpu",
    }
    outcome = command("run", tmp_path / "probe.toml", *sets(settings))
    assert outcome.status == 0, outcome.err
    require_equal(load_file(tmp_path / "runs" / "probe" / "direction.safetensors"), run.taken)
    # Of the moments as saved, which this step's gradient of 0 lets decay, it would be another.
    policy = load_policy(PolicyConfig(checkpoint=str(run.before)), torch.device("cpu"))
    state, _ = read_adam_state(run.before / "optimizer.pt", policy.model, policy.params)
    as_saved = tree.scale(-1.0, funcprobe.precondition(state.exp_avg, state))
    with pytest.raises(AssertionError):
        require_equal(as_saved, run.taken)


@pytest.mark.slow
def test_next_step_of_the_toy_is_the_one_trl_takes(tmp_path, tmp_path_factory):
    """The built-in policy: adapters on all linears, real sums as rewards."""
    from funcprobe.adapters.checkpoint.toy import ensure_toy

    toy = ensure_toy()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    place = Checkpoint(toy.base, toy.checkpoint, toy.prompts, toy.prompts)
    run = train(
        place,
        tmp_path,
        lora=lora,
        rewards=right,
        max_completion_length=16,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        num_generations=8,
        max_grad_norm=0.1,
    )
    policy = load_policy(PolicyConfig(checkpoint=str(run.before)), torch.device("cpu"))
    adam_state, _ = read_adam_state(run.before / "optimizer.pt", policy.model, policy.params)
    U = rollouts.load_rollouts(run.rollouts, 258, rewards=True, advantages=True)
    batch = rollouts.to_batch(U)
    coef_NR = funcprobe.coefficients(
        torch.tensor(U.advantage, dtype=torch.float64),
        batch.response_length_N,
        batch.prompt_N,
        "token_mean",
    )
    probe = funcprobe.bind(policy.model)
    Y = probe.grad_Y(probe.params, UpdateBatch(batch, coef_NR))
    v = funcprobe.update_direction(probe.params, Y, adam_state, max_grad_norm=0.1)
    require_equal(v.total, run.taken)


def test_settings_that_change_the_loss_are_trls_and_saved():
    """Off is TRL's default but for vLLM's correction; the sidecar has all that are looked for."""
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    terms = differences._TERMS | differences.SEQUENCES
    assert {name: defaults[name] for name in terms} == terms
    assert defaults[differences._CORRECTION] is True
    assert differences.terms(defaults) == []
    assert [name for name, *_ in differences.terms(defaults | {"use_vllm": True})] == [
        differences._CORRECTION
    ]
    assert set(terms) <= set(names.LOSS)
    assert {"use_vllm", differences._CORRECTION} <= set(names.SAMPLING)
