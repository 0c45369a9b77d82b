"""Recorded steps: what the trainer's loss was given, sequence by sequence, and nothing else."""

import json
import math
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

import funcprobe
from funcprobe import InputError
from funcprobe.adapters import rollouts
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.rollouts.files import of_rank
from funcprobe.adapters.sampling.advantages import update_advantages
from funcprobe.adapters.stages.run_settings import run_settings
from funcprobe.adapters.trainers import ParamNamesCallback, record_rollouts
from support.checkpoints import Checkpoint, sets
from support.recorded import Calls, calls_of_the_loss, require_recorded, train_in_processes
from support.slow import first
from support.trainers import grpo_trainer, outcome, require_same, reward

# The calls of the loss.

# The prompts are six: a generation of 16 is of four.
SHORT = {"max_steps": 4, "per_device_train_batch_size": 8}
FOUR = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}


def record(checkpoint: Checkpoint, folder: Path, **settings: Any) -> tuple[GRPOTrainer, list[Calls]]:
    """A short training, recorded in folder/rollouts, and what its loss was given."""
    trainer = grpo_trainer(checkpoint, folder, **(SHORT | settings))
    steps = calls_of_the_loss(trainer)
    record_rollouts(trainer, folder / "rollouts")
    return trainer, steps


def load(folder: Path, step: int) -> rollouts.Rollouts:
    path = folder / "rollouts" / f"step-{step:06d}.parquet"
    return rollouts.load_rollouts(path, 14, rewards=False, advantages=True, eos_ids=(1,))


def require_steps(folder: Path, steps: list[Calls], first: int = 1) -> list[rollouts.Rollouts]:
    """A file for every step, each with the calls of the loss in it."""
    names = [f"step-{n:06d}.parquet" for n in range(first, first + len(steps))]
    assert [file.name for file in sorted((folder / "rollouts").iterdir())] == names
    files = [load(folder, n) for n in range(first, first + len(steps))]
    for number, (found, calls) in enumerate(zip(files, steps, strict=True), first):
        require_recorded(found, calls)
        assert found.step == number
        assert found.process == [0] * len(found.process)
    return files


@pytest.mark.parametrize(
    "settings",
    first(
        6,
        [
            {},
            FOUR,
            {"num_iterations": 2},
            {"num_iterations": 2} | FOUR,
            {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
            {
                "steps_per_generation": 4,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 4,
            },
            {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "num_iterations": 2},
            {"mask_truncated_completions": True},
            {"mask_truncated_completions": True, "num_iterations": 2, "beta": 0.04} | FOUR,
            {"beta": 0.04},
            {"loss_type": "bnpo"} | FOUR,
            {"loss_type": "grpo", "top_entropy_quantile": 0.5},
            {"loss_type": "dr_grpo", "off_policy_mask_threshold": 0.1, "num_iterations": 2},
            {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
            {"loss_type": "sapo", "num_iterations": 2},
            {"loss_type": "vespo", "num_iterations": 2},
            {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2},
        ],
    ),
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()) or "plain",
)
def test_a_step_is_what_the_loss_was_given(settings, checkpoint, tmp_path):
    trainer, steps = record(checkpoint, tmp_path, **settings)
    trainer.train()
    assert [len(calls) for calls in steps] == [settings.get("gradient_accumulation_steps", 1)] * 4
    files = require_steps(tmp_path, steps)
    used_later = settings.get("num_iterations", 1) > 1 or "steps_per_generation" in settings
    aligned = settings.get("steps_per_generation") == 1  # a whole step of one generation used twice
    for found in files:
        assert found.entropy_coef == 0.0
        assert found.reward == pytest.approx(reward(found.response))
        assert (found.old_logp is not None) == (used_later and not aligned)
        assert (found.ref_logp is not None) == ("beta" in settings)
        assert found.prompt_index == sorted(found.prompt_index)  # as generated
        masked = [not any(mask) for mask in found.loss_mask]
        # As TRL has it, a response of the full length that ends in a padding token is not cut off.
        cut = [y[-1] not in {0, 1} for y in found.response_ids]
        assert masked == [c and settings.get("mask_truncated_completions", False) for c in cut]
        for y, reason in zip(found.response_ids, found.finish_reason, strict=True):
            assert (reason, y[-1] == 1) in {("stop", True), ("length", False)}
            assert len(y) == 6 or reason == "stop"
    assert "length" in {reason for found in files for reason in found.finish_reason}
    if settings.get("num_iterations") == 2 and not aligned:
        # The second step takes the first one's sequences, in micro-batches of the same content.
        assert files[0].response_ids == files[1].response_ids != files[2].response_ids
        assert files[0].old_logp == files[1].old_logp
        assert files[0].microbatch == files[1].microbatch
    if settings.get("steps_per_generation") == 4:
        # Two halves of one generation, with its groups.
        assert set(files[0].generated_tokens) == set(files[1].generated_tokens)
        assert len(set(files[0].generated_tokens)) == 1
        assert not Counter(map(str, files[0].old_logp)) & Counter(map(str, files[1].old_logp))
        both = Counter(files[0].prompt_index + files[1].prompt_index)
        assert both == dict.fromkeys(range(4), 4)


def test_the_generations_of_a_step_are_kept_apart(checkpoint, tmp_path):
    """Two, each with groups and a number of tokens of its own, by which dapo divides."""
    settings = {"steps_per_generation": 1, "gradient_accumulation_steps": 2}
    trainer, steps = record(checkpoint, tmp_path, **settings)
    trainer.train()
    for number, calls in enumerate(steps, 1):
        found = load(tmp_path, number)
        require_recorded(found, calls)
        count = 8 * len(calls)  # three micro-batches to an epoch: the second step has one
        assert found.prompt_index == [i // 4 for i in range(count)]
        assert found.microbatch == [i // 8 for i in range(count)]
        for i in range(0, count, 8):
            tokens = sum(map(len, found.response_ids[i : i + 8]))
            assert found.generated_tokens[i : i + 8] == [tokens] * 8
    assert len(set(load(tmp_path, 1).generated_tokens)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "cispo", "steps_per_generation": 1, "gradient_accumulation_steps": 2},
        # Out of phase: the second step begins with the second half of a generation.
        {"loss_type": "vespo", "steps_per_generation": 2, "gradient_accumulation_steps": 3},
    ],
)
def test_a_step_of_several_generations_is_what_the_loss_was_given(settings, checkpoint, tmp_path):
    trainer, steps = record(checkpoint, tmp_path, per_device_train_batch_size=4, **settings)
    trainer.train()
    files = require_steps(tmp_path, steps)
    assert max(len(set(found.generated_tokens)) for found in files) == 2


def test_a_generation_twice_in_a_step_has_the_recorded_advantages(checkpoint, tmp_path):
    """A group of 4 is then one of 8, of another standard deviation: by (6 / 7)^(1/2), which is said."""
    twice = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "num_iterations": 2}
    trainer, _ = record(checkpoint, tmp_path, **twice, save_steps=1)
    trainer.add_callback(ParamNamesCallback())
    trainer.train()
    found = load(tmp_path, 2)
    assert found.response_ids[::2] == found.response_ids[1::2]
    assert (found.microbatch, found.prompt_index) == ([0, 1] * 8, [i // 8 for i in range(16)])
    recorded_N, lines = update_advantages(found, "rollouts")
    assert lines == []
    made_N, (line,) = update_advantages(found, "mean_std")
    assert "supplied advantages of U" in line
    assert 'set objective.advantage = "rollouts"' in line
    ratio_N = (recorded_N / made_N)[recorded_N != 0]
    expected_N = torch.full_like(ratio_N, (6 / 7) ** 0.5)
    assert len(ratio_N) > 0
    # The 1e-4 beside standard deviations of 0.2 and more.
    torch.testing.assert_close(ratio_N, expected_N, rtol=1e-3, atol=0)
    # By the sidecar a run has TRL's loss, and the recorded advantages.
    taken = run_settings(
        Config.model_validate(
            {
                "policy": {"checkpoint": str(tmp_path / "checkpoint-1")},
                "prompts": {"source": str(checkpoint.prompts)},
                "rollouts": {"update": str(tmp_path / "rollouts" / "step-000002.parquet")},
            }
        )
    )
    assert (taken["objective"]["loss"], taken["objective"]["advantage"]) == ("trl", "rollouts")


def test_the_coefficient_of_the_entropy_is_the_one_in_effect(checkpoint, tmp_path):
    """TRL moves it at the end of each step, and gates it by the entropy of the step before."""
    settings = {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_coef_delta": 0.01}
    trainer, _ = record(checkpoint, tmp_path, entropy_target=9.0, **settings)
    trainer.train()
    # At first no entropy is known, which counts as above the target; then all are below it.
    assert [load(tmp_path, n).entropy_coef for n in range(1, 5)] == pytest.approx([0, 0.06, 0.07, 0.08])
    trainer, _ = record(checkpoint, tmp_path / "above", entropy_target=1e-3, **settings)
    trainer.train()
    assert [load(tmp_path / "above", n).entropy_coef for n in range(1, 5)] == [0.0] * 4
    trainer, _ = record(checkpoint, tmp_path / "fixed", entropy_coef=0.25)
    trainer.train()
    assert [load(tmp_path / "fixed", n).entropy_coef for n in range(1, 5)] == [0.25] * 4


def test_sampler_log_probabilities_and_tools(checkpoint, tmp_path):
    """As vLLM returns them, NaN where it could not score, and tokens that a tool wrote."""
    trainer = grpo_trainer(checkpoint, tmp_path, **SHORT)
    generate = trainer._generate

    def generating(prompts: Any) -> Any:
        made = list(generate(prompts))
        made[4] = [[-0.25 * (k + 1) for k in range(len(y))] for y in made[1]]
        made[4][0][0] = None
        made[2] = [[int(k != 1) for k in range(len(y))] for y in made[1]]
        return tuple(made)

    trainer._generate = generating
    steps = calls_of_the_loss(trainer)
    record_rollouts(trainer, tmp_path / "rollouts")
    trainer.train()
    for found in require_steps(tmp_path, steps):
        assert math.isnan(found.sampler_logp[0][0])
        for mask, logp in zip(found.loss_mask, found.sampler_logp, strict=True):
            assert mask == [k != 1 for k in range(len(mask))]
            assert logp[1:] == [-0.25 * (k + 1) for k in range(1, len(logp))]
        with pytest.raises(InputError, match="row 0 has sampler_logp that is not a log-prob"):
            rollouts.load_rollouts(tmp_path / "rollouts" / "step-000001.parquet", 14, rewards=False)


def test_recorded_rollouts_are_what_trl_generated(checkpoint, tmp_path):
    trainer = grpo_trainer(
        checkpoint, tmp_path, max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=2
    )
    outputs = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (
        outputs.append(generate(inputs)) or outputs[-1]
    )
    record_rollouts(trainer, tmp_path / "rollouts")
    trainer.train()
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [file.name for file in files] == ["step-000001.parquet", "step-000002.parquet"]
    tokenizer = trainer.processing_class
    for file, output in zip(files, outputs, strict=True):
        found = rollouts.load_rollouts(file, 14, rewards=True, advantages=True, eos_ids=(1,))
        assert found.prompt_index == [i // 4 for i in range(16)]
        assert found.temperature == 1.0
        assert found.advantage == output["advantages"].tolist()
        assert found.reward == pytest.approx(reward(found.response))
        assert set(found.finish_reason) == {"stop", "length"}
        for i in range(16):
            x, y = found.prompt_ids[i], found.response_ids[i]
            # Padding is on the left of the prompt and on the right of the completion.
            assert output["prompt_ids"][i].tolist() == [0] * (len(output["prompt_ids"][i]) - len(x)) + x
            assert output["completion_ids"][i].tolist() == y + [0] * (
                len(output["completion_ids"][i]) - len(y)
            )
            assert tokenizer.encode(found.prompt[i]) == x
            assert (found.finish_reason[i] == "stop") == (y[-1] == 1)
        assert sum(map(len, found.response_ids)) == int(output["num_items_in_batch"])


# The loop around the steps.


def test_a_shorter_last_step_and_evaluations(checkpoint, tmp_path):
    """Three micro-batches to an epoch in steps of two, an evaluation after each."""
    rows = [json.loads(line) for line in checkpoint.prompts.read_text().splitlines()]
    trainer, steps = record(
        checkpoint,
        tmp_path,
        loss_type="grpo",
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        per_device_eval_batch_size=4,
        eval_steps=1,
    )
    trainer.eval_dataset, trainer.args.eval_strategy = Dataset.from_list(rows[:2]), "steps"
    trainer.train()
    assert [len(calls) for calls in steps] == [2, 1, 2, 1]
    for number, calls in enumerate(steps, 1):
        found = load(tmp_path, number)
        assert sorted(set(found.microbatch)) == list(range(len(calls)))
        require_recorded(found, calls)
    assert sum("eval_reward" in entry for entry in trainer.state.log_history) == 4


def test_a_resumed_training_records_the_steps_that_follow(checkpoint, tmp_path):
    settings = {"num_iterations": 2, "save_steps": 1, "max_steps": 3}
    trainer, _ = record(checkpoint, tmp_path / "first", **settings)
    trainer.train()
    trainer, steps = record(checkpoint, tmp_path / "second", **(settings | {"max_steps": 5}))
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    # Its own step count starts anew, with a new generation.
    require_steps(tmp_path / "second", steps[-2:], first=4)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_a_training_that_failed_leaves_nothing_for_the_next(loss, checkpoint, tmp_path):
    """Stopped inside a step, then begun again by the same trainer, whose generations are then split."""
    trainer, steps = record(checkpoint, tmp_path, max_steps=1, loss_type=loss, **FOUR)
    backward, failures = trainer.accelerator.backward, [None]

    def failing(loss: Any, **kwargs: Any) -> None:
        if len(steps[0]) == 3 and failures:
            raise ZeroDivisionError(failures.pop())
        backward(loss, **kwargs)

    trainer.accelerator.backward = failing
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (tmp_path / "rollouts").exists()
    trainer.train()
    (found,) = require_steps(tmp_path, [steps[0][3:]])
    assert len(set(found.generated_tokens)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2, "beta": 0.04, "mask_truncated_completions": True} | FOUR,
        {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1},
    ],
)
def test_training_is_the_same_bit_by_bit(settings, checkpoint, tmp_path):
    plain = grpo_trainer(checkpoint, tmp_path / "plain", **(SHORT | settings))
    off = outcome(plain)
    recorded, _ = record(checkpoint, tmp_path / "recorded", **settings)
    require_same(off, outcome(recorded))


# Several processes.


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "num_iterations": 2}],
)
def test_every_process_writes_its_own(settings, checkpoint, command, tmp_path):
    """Read as one file: all sequences of all ranks, of which the second group is split between them."""
    settings = SHORT | {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 6} | settings
    ranks = train_in_processes(checkpoint, tmp_path, **settings)
    names = [f"step-{n:06d}.rank-{rank:05d}-of-00002.parquet" for n in (1, 2) for rank in (0, 1)]
    assert [file.name for file in sorted((tmp_path / "rollouts").iterdir())] == names
    for number in (1, 2):
        found = load(tmp_path, number)
        for rank, steps in enumerate(ranks):
            require_recorded(found, steps[number - 1], rank)
        second = {p for p, i in zip(found.process, found.prompt_index, strict=True) if i == 1}
        assert second == {0, 1}
        assert found.reward == pytest.approx(reward(found.response))
        advantage = torch.tensor(found.advantage, dtype=torch.float64)
        made = funcprobe.advantages(
            torch.tensor(found.reward, dtype=torch.float64),
            torch.tensor(found.prompt_index),
            "mean_std",
        )
        torch.testing.assert_close(made, advantage, rtol=1e-5, atol=1e-5)  # TRL's are float32
    said = json.loads((tmp_path / "checkpoint-2" / "optimizer_param_names.json").read_text())
    assert said["loss"]["world_size"] == 2
    # A run takes the name without the rank, and knows the step.
    config, path = tmp_path / "probe.toml", tmp_path / "rollouts" / "step-000002.parquet"
    config.write_text("")
    chosen = {"policy.checkpoint": str(tmp_path / "checkpoint-1"), "rollouts.update": str(path)}
    chosen |= {"prompts.source": str(checkpoint.prompts), "objective.advantage": "rollouts"}
    found = command("run", config, "--dry-run", *sets(chosen | {"run.device": "cpu"}))
    assert (found.status, path.is_file()) == (0, False), found.err
    of_rank(path, 1, 2).unlink()
    found = command("run", config, "--dry-run", *sets(chosen | {"run.device": "cpu"}))
    assert found.status == 2
    assert "of the files of 2 ranks, 1 are missing" in found.err.splitlines()[-1]


def test_nothing_is_recorded_of_evaluation(checkpoint, tmp_path):
    trainer = grpo_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.eval_dataset = trainer.train_dataset
    record_rollouts(trainer, tmp_path / "rollouts")
    trainer.model.eval()
    trainer._generate_and_score_completions([{"prompt": "3+4="}] * 4)
    assert not (tmp_path / "rollouts").exists()


def test_a_reward_that_does_not_apply_is_none(checkpoint, tmp_path):
    trainer = grpo_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.reward_funcs[0] = lambda completions, **_: [None, *reward(completions)[1:]]
    record_rollouts(trainer, tmp_path / "rollouts")
    trainer.train()
    found = rollouts.load_rollouts(
        tmp_path / "rollouts" / "step-000001.parquet", 14, rewards=False, advantages=True
    )
    assert found.reward is None or found.reward[0] != found.reward[0]
    assert found.advantage is not None
    assert found.advantage[0] == 0


# What is rejected, before the first step.


def test_images_are_refused(checkpoint, tmp_path):
    for change in ("column", "tools"):
        trainer = grpo_trainer(checkpoint, tmp_path)
        if change == "column":
            trainer.train_dataset = trainer.train_dataset.add_column("images", [[]] * 6)
        else:
            trainer._is_vlm, trainer.tools = True, [len]
        with pytest.raises(InputError, match="contain images, and only tokens can be recorded"):
            record_rollouts(trainer, tmp_path)
    trainer = grpo_trainer(checkpoint, tmp_path)
    trainer.tools = [len]  # of a model of text alone
    record_rollouts(trainer, tmp_path)


def test_a_routers_loss_is_pointed_out(checkpoint, tmp_path):
    trainer = grpo_trainer(checkpoint, tmp_path)
    trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 0.001
    with pytest.warns(UserWarning, match=r"router_aux_loss_coef is 0\.001: the step has a router's"):
        record_rollouts(trainer, tmp_path)


def test_another_trl_is_refused(checkpoint, tmp_path, monkeypatch):
    for method in ("_calculate_rewards", "_compute_loss", "_generate_and_score_completions"):
        trainer = grpo_trainer(checkpoint, tmp_path, max_steps=1)
        with monkeypatch.context() as patch:
            patch.setattr(GRPOTrainer, method, None)
            with pytest.raises(InputError, match=rf"no {method}\(\) \(trl 1\."):
                record_rollouts(trainer, tmp_path)
    trainer = grpo_trainer(checkpoint, tmp_path, use_adaptive_entropy=True)
    del trainer._last_world_entropy
    with pytest.raises(InputError, match=r"no _last_world_entropy \(trl 1\."):
        record_rollouts(trainer, tmp_path)
    # Of another trainer the settings of GRPO may be missing; RLOO keeps no log-probability of a token.
    trainer = grpo_trainer(checkpoint, tmp_path)
    trainer.args = types.SimpleNamespace(gradient_accumulation_steps=1)
    record_rollouts(trainer, tmp_path)
    trainer.args = types.SimpleNamespace(gradient_accumulation_steps=1, num_iterations=2)
    with pytest.raises(InputError, match=r"num_iterations = 2, .* set num_iterations to 1"):
        record_rollouts(trainer, tmp_path)
    for damage, said in (
        ({"advantages": None}, "no tensor advantages"),
        ({"advantages": torch.ones(16, 6)}, "no advantage of a sequence"),
        ({"pixel_values": torch.ones(1)}, "contain images"),
    ):
        trainer = grpo_trainer(checkpoint, tmp_path, max_steps=1)
        generate = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda x, g=generate, d=damage: g(x) | d
        record_rollouts(trainer, tmp_path / "rollouts")
        with pytest.raises(InputError, match=said):
            trainer.train()
