"""From checkpoint and configuration to the rule of the step, and what the reader is told of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.rollouts import load_rollouts, save_rollouts
from funcprobe.adapters.stages.step import load_step, step_lines
from funcprobe.types import InputError
from support.checkpoints import Checkpoint, sets
from support.sidecars import with_sidecar


@pytest.fixture(scope="module")
def policy(checkpoint: Checkpoint):
    return load_policy(Config.model_validate(policy_of(checkpoint)).policy, torch.device("cpu"))


def policy_of(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"policy": {"checkpoint": str(checkpoint.adapter)}}


def lines(policy, place: Checkpoint, **sections: dict[str, Any]) -> tuple[Any, str]:
    config = Config.model_validate(policy_of(place) | sections)
    adam_state, report, step = load_step(config, policy)
    return step, "\n".join(step_lines(config, adam_state, report, step))


ACCEPT = {"accept_positional": True}


def test_positions_that_the_file_cannot_verify_are_said(policy, checkpoint) -> None:
    """The gradients on U decide later."""
    _, said = lines(policy, checkpoint)
    assert "alone, 12 of 12 share their shape with another; the gradients on U verify the order" in said
    assert "warning: the run's max_grad_norm is unknown, 1 (the Trainer's default) is used" in said


def test_clipping_is_the_runs_own_where_it_is_known(policy, damaged) -> None:
    with_sidecar(damaged)
    same = {"sampling": {"temperature": 0.9}, "objective": {"preset": "grpo"}}
    step, said = lines(policy, damaged, **same)
    assert step.max_grad_norm == 0.3
    assert "warning" not in said
    step, said = lines(policy, damaged, optimizer={"max_grad_norm": 0.5}, **same)
    assert step.max_grad_norm == 0.5
    assert "warning: optimizer.max_grad_norm is 0.5, the run was trained with 0.3" in said
    step, said = lines(policy, damaged, optimizer={"max_grad_norm": 0.3}, **same)
    assert "warning" not in said


@pytest.mark.parametrize(("saved", "used"), [(0.0, None), (None, 1.0), (2, 2)])
def test_clipping_of_other_runs(policy, damaged, saved, used) -> None:
    with_sidecar(damaged, max_grad_norm=saved)
    step, said = lines(policy, damaged)
    assert step.max_grad_norm == used
    assert ("max_grad_norm is unknown" in said) == (saved is None)
    assert lines(policy, damaged, optimizer={"max_grad_norm": 0.0})[0].max_grad_norm is None


def test_other_settings_than_the_runs_are_told(policy, damaged) -> None:
    with_sidecar(damaged)
    _, said = lines(policy, damaged)
    assert "warning: the run's sampling had temperature 0.9, sampling.temperature is 1" in said
    assert "warning: the run's loss_type was grpo, objective.preset is dapo" in said
    _, said = lines(policy, damaged, objective={"normalisation": "sequence_mean"})
    assert "loss_type" not in said


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"top_p": 0.9}, "sampling had top_p = 0.9, but U is sampled without it here"),
        ({"top_k": 10}, "top_k = 10"),
        ({"min_p": 0.1}, "min_p = 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty = 1.1"),
        ({"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}, ""),
    ],
)
def test_samplings_that_are_not_the_probes_are_told(policy, damaged, sampling, said) -> None:
    with_sidecar(damaged, loss={}, sampling=sampling)
    _, found = lines(policy, damaged)
    assert found.count("warning") == bool(said)
    assert said in found
    _, found = lines(policy, damaged, rollouts={"update": "u.parquet"})
    assert "warning" not in found


def test_other_arguments_of_the_chat_template(policy, damaged) -> None:
    ran = {"enable_thinking": False}
    with_sidecar(damaged, loss={}, sampling={"chat_template_kwargs": ran})
    _, found = lines(policy, damaged)
    assert "the run's chat_template_kwargs were {'enable_thinking': False}, prompts." in found
    for same in (
        {"prompts": {"chat_template_kwargs": ran}},
        {"rollouts": {"eval": "e.parquet", "update": "u.parquet"}},
    ):
        assert "chat_template_kwargs" not in lines(policy, damaged, **same)[1]


def test_states_of_other_checkpoints_are_told(policy, damaged) -> None:
    same = {"sampling": {"temperature": 0.9}, "objective": {"preset": "grpo"}}
    for trained, warned in ((2, False), (1, True), (7, True)):
        with_sidecar(damaged, global_step=trained)
        (damaged.adapter / "trainer_state.json").write_text('{"global_step": 2}')
        _, said = lines(policy, damaged, **same)
        assert (f"optimizer_param_names.json records {trained}" in said) == warned
        with_sidecar(damaged)
        (damaged.adapter / "trainer_state.json").write_text(f'{{"global_step": {trained}}}')
        _, said = lines(policy, damaged, **same)
        assert (f"trainer_state.json records {trained}" in said) == warned
    for text in ("{}", '{"global_step": Infinity}', "[" * 100_000, '{"global_step": "x"}'):
        (damaged.adapter / "trainer_state.json").write_text(text)
        with pytest.raises(InputError, match="has no global_step"):
            lines(policy, damaged)


def test_a_state_beside_several_adapters_needs_names(policy, damaged) -> None:
    """peft's layout of several adapters: a folder for each, the state above them."""
    root = damaged.adapter
    for name in ("policy", "ref"):
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text((root / "adapter_config.json").read_text())
    (root / "adapter_config.json").unlink()
    sections = {"policy": {"checkpoint": str(root), "adapter": "ref"}, "optimizer": ACCEPT}
    with pytest.raises(InputError, match="is beside the adapters policy, ref"):
        load_step(Config.model_validate(sections), policy)


@pytest.mark.parametrize("max_update", [None, 5.0])
def test_bound_of_the_update(policy, checkpoint, max_update) -> None:
    step, _ = lines(policy, checkpoint, optimizer=ACCEPT | {"max_update": max_update})
    assert step.max_update == max_update


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"loss_type": "cispo"}, "loss_type was cispo, whose gradient is not that of any objective"),
        ({"loss_type": "bnpo"}, "loss_type was bnpo, a token mean of each micro-batch"),
        ({"beta": 0.04}, "beta was 0.04"),
        ({"entropy_coef": 0.1}, "entropy_coef was 0.1"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy was True"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile was 0.2"),
        ({"num_iterations": 2}, "num_iterations was 2"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions was True"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold was 0.5"),
        (
            {"scale_rewards": "none"},
            'scale_rewards was none, objective.advantage is mean_std: set it to "mean"',
        ),
        (
            {"scale_rewards": "batch"},
            "scale_rewards was batch, objective.advantage is mean_std: only the run's own rollouts",
        ),
        ({"scale_rewards": "group"}, ""),
        ({"loss_type": ["dapo"]}, ""),
        ({"loss_type": "dapo", "beta": 0.0, "top_entropy_quantile": 1.0, "entropy_coef": None}, ""),
    ],
)
def test_losses_that_are_not_the_objective_are_told(policy, damaged, loss, said) -> None:
    with_sidecar(damaged, loss=loss, sampling={})
    _, found = lines(policy, damaged)
    assert found.count("warning") == bool(said)
    assert said in found


def test_a_divisor_of_ones_own_is_compared_with_the_runs(policy, damaged) -> None:
    with_sidecar(damaged, loss={"loss_type": "dr_grpo"}, sampling={"max_completion_length": 24})
    mine = {"preset": "dr_grpo", "normalisation": "sequence_mean"}
    _, found = lines(policy, damaged, objective=mine)
    assert "loss_type was dr_grpo, objective.normalisation is sequence_mean" in found
    for constant, warned in ((24.0, 0), (16.0, 1)):
        _, found = lines(policy, damaged, objective={"preset": "dr_grpo", "constant": constant})
        assert found.count("warning") == warned
        assert ("max_completion_length was 24, objective.constant is 16" in found) == warned


@pytest.mark.parametrize("vllm", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_a_correction_to_another_sampler_is_told(vllm, corrected, policy, damaged) -> None:
    """It is on by default, and does nothing without vLLM."""
    sampling = {"use_vllm": vllm, "vllm_importance_sampling_correction": corrected}
    with_sidecar(damaged, loss={}, sampling=sampling)
    _, found = lines(policy, damaged)
    told = "warning: the run's vllm_importance_sampling_correction was True" in found
    assert told == (vllm and corrected)
    assert found.count("warning") == told


def test_rules_that_do_not_clip_say_nothing_of_it(policy, checkpoint) -> None:
    _, said = lines(policy, checkpoint, optimizer=ACCEPT | {"rule": "precondition"})
    assert "max_grad_norm" not in said
    assert lines(policy, checkpoint, optimizer={"rule": "sgd"})[1] == (
        'optimizer: rule "sgd", no state is read'
    )


def test_a_state_of_another_adapter_is_not_taken(policy, checkpoint) -> None:
    config = Config.model_validate(
        {"policy": {"checkpoint": str(checkpoint.adapter), "adapter": "ref"}, "optimizer": ACCEPT}
    )
    with pytest.raises(InputError, match="belongs to the adapter in that folder, not to ref/"):
        load_step(config, policy)


# In a run


def derivative(document: dict[str, Any]) -> float:
    return document["first_order"]["derivative"]["value"]


@pytest.mark.slow
def test_the_constant_of_the_objective_divides(probe) -> None:
    norms = [
        probe("one", objective__preset="dr_grpo", **constant)["norms"]["Y"]["value"]
        for constant in ({}, {"objective__constant": 24.0})
    ]
    assert norms[0] / norms[1] == pytest.approx(24 / 6, rel=1e-12)  # max_new_tokens is 6


@pytest.mark.slow
def test_the_next_lr_is_the_configurations_where_it_has_one(probe) -> None:
    document = probe("one", optimizer__lr=3e-4)
    assert document["next_lr"]["value"] == 3e-4
    assert [row["eta"] for row in document["sweep"] if row["is_next_lr"]] == [3e-4]


@pytest.mark.slow
def test_the_next_lr_is_of_the_first_group_that_has_parameters(probe, damaged) -> None:
    file = damaged.adapter / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    full, empty = state["param_groups"]
    state["param_groups"] = [empty | {"lr": 7e-9}, full]
    torch.save(state, file)
    base = AutoModelForCausalLM.from_pretrained(damaged.base)
    model = PeftModel.from_pretrained(base, damaged.adapter, is_trainable=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sidecar = {"param_name_groups": [[], names]}
    (damaged.adapter / "optimizer_param_names.json").write_text(json.dumps(sidecar))
    assert probe("one", of=damaged)["next_lr"]["value"] == 1e-3


@pytest.mark.slow
def test_low_coverage_is_refused_or_makes_the_raw_gradient_the_direction(
    probe, command, damaged
) -> None:
    Path("c.toml").touch()
    file = damaged.adapter / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    for key in range(5):
        del state["state"][key]
    torch.save(state, file)
    outcome = command("run", "c.toml", "--dry-run", *sets(damaged.settings()))
    assert outcome.status == 2
    assert "7 of 12" in outcome.err
    document = probe("one", of=damaged, optimizer__on_low_coverage="identity")
    first = document["first_order"]
    assert document["conventions"]["step"]["rule"] == "sgd"
    assert first["bars_dot"]["value"] == first["bars_dot_identity"]["value"]
    assert first["from_momentum"]["value"] == first["from_weight_decay"]["value"] == 0
    assert 'on_low_coverage = "identity"' in Path("runs/one/run.log").read_text()


# Whether E is a sample of the policy


@pytest.mark.slow
def test_e_at_another_temperature_is_suspect(probe) -> None:
    """Brought as if at 1; the check sees all of E, and its own log-probabilities take its place."""
    few: dict[str, Any] = {"measure__etas": [1e-5], "measure__next_lr": False}
    probe("one", sampling__temperature=0.4, sampling__B_E=80, **few)
    drawn = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    save_rollouts(drawn._replace(temperature=1.0), Path("e.parquet"))

    def last(document: dict[str, Any]) -> dict[str, Any]:
        (found,) = [c for c in document["checks"] if c["name"].startswith("E")]
        return found

    found = last(probe("two", rollouts__eval="e.parquet", **few))
    assert (found["passed"], found["advisory"]) == (False, True)
    assert "temperature" in found["failure_means"]
    assert last(probe("three", sampling__B_E=80, **few))["passed"]
    logp = [[-1.0] * len(y) for y in drawn.response_ids]
    save_rollouts(drawn._replace(temperature=1.0, sampler_logp=logp), Path("e.parquet"))
    found = last(probe("four", rollouts__eval="e.parquet", **few))
    assert found["name"] == "E's sampler is near the policy"
    assert "of 80 at eta = 0" in found["saw"]


@pytest.mark.slow
def test_without_optimizer_state_the_gradient_is_the_direction(probe, damaged) -> None:
    (damaged.adapter / "optimizer.pt").unlink()
    document = probe("one", of=damaged, optimizer__rule="sgd", optimizer__max_grad_norm=0.0)
    first = document["first_order"]
    assert first["bars_dot"]["value"] == first["bars_dot_identity"]["value"]
    assert first["from_momentum"]["value"] == first["from_weight_decay"]["value"] == 0
    assert document["norms"]["v"]["value"] == document["norms"]["Y"]["value"]
    assert not any(row["is_next_lr"] for row in document["sweep"])
