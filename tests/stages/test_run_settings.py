"""What a configuration leaves unset is the training run's; what is set stays, and warns if unlike."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.optimizer import find_sidecar
from funcprobe.adapters.stages.chosen_loss import choose_loss
from funcprobe.adapters.stages.differences import differences
from funcprobe.adapters.stages.run_settings import with_run_settings
from funcprobe.adapters.stages.step import choose_objective
from funcprobe.types import InputError
from support.checkpoints import sets
from support.sidecars import with_sidecar

SAMPLING = {"temperature": 0.7, "num_generations": 4, "max_completion_length": 24}
STEP = {"generation_batch_size": 32, "gradient_accumulation_steps": 2, "steps_per_generation": 2}


@pytest.fixture
def resolved(damaged):
    """(configuration, lines) for a sidecar and what the user's file sets."""

    def call(sidecar: dict[str, Any], **sections: dict[str, Any]) -> tuple[Config, list[str]]:
        with_sidecar(damaged, **({"loss": {}, "sampling": {}, "max_grad_norm": None} | sidecar))
        config = Config.model_validate({"policy": {"checkpoint": str(damaged.adapter)}} | sections)
        lines: list[str] = []
        return with_run_settings(config, lines.append), lines

    return call


def test_unset_keys_take_the_runs_values_and_set_ones_stay(resolved) -> None:
    sidecar = {"sampling": SAMPLING, "loss": STEP | {"loss_type": "grpo"}, "max_grad_norm": 0.3}
    config, (line,) = resolved(sidecar)
    chosen = config.sampling
    assert (chosen.temperature, chosen.G, chosen.B_U, chosen.max_new_tokens) == (0.7, 4, 8, 24)
    assert (config.objective.preset, config.optimizer.max_grad_norm) == ("grpo", 0.3)
    for key in ("temperature = 0.7", "G = 4", "B_U = 8", "max_new_tokens = 24", 'preset = "grpo"'):
        assert key in line
    assert "max_grad_norm = 0.3" in line
    mine = {"temperature": 1.0, "G": 8, "max_new_tokens": 256}  # set to the defaults
    config, (line,) = resolved(sidecar, sampling=mine, objective={"preset": "dapo"})
    assert config.sampling.model_dump(include=set(mine)) == mine
    assert config.objective.preset == "dapo"
    assert "temperature" not in line
    assert config.sampling.B_U == 32 // 4


def test_nothing_is_taken_where_nothing_is_known(resolved, checkpoint) -> None:
    config, lines = resolved({})
    assert (config.sampling, lines) == (Config().sampling, [])
    plain = Config.model_validate({"policy": {"checkpoint": str(checkpoint.adapter)}})
    assert with_run_settings(plain, lines.append) is plain
    supplied, (line,) = resolved({"sampling": SAMPLING}, rollouts={"update": "u.parquet"})
    assert (supplied.sampling.G, "sampling.G" in line) == (8, False)  # no U is sampled
    sgd, _ = resolved({"max_grad_norm": 0.3}, optimizer={"rule": "sgd"})
    assert sgd.optimizer.max_grad_norm is None


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"loss_type": "grpo", "scale_rewards": "group"}, ("mean_std", "sequence_mean")),
        ({"loss_type": "dapo", "scale_rewards": "none"}, ("mean", "token_mean")),
        ({"loss_type": "dapo", "scale_rewards": True}, ("mean_std", "token_mean")),
        ({"loss_type": "dr_grpo", "scale_rewards": "none"}, ("mean", "constant")),
        ({"loss_type": "dr_grpo", "scale_rewards": "group"}, ("mean_std", "constant")),
        ({"loss_type": "bnpo", "gradient_accumulation_steps": 1}, ("mean_std", "token_mean")),
        ({"normalize_advantages": False}, ("leave_one_out", "sequence")),
        # No objective here has this gradient: the default, with the line of `differences`.
        ({"normalize_advantages": True}, ("mean_std", "token_mean")),
        ({"loss_type": "grpo", "scale_rewards": "batch"}, ("mean_std", "sequence_mean")),
    ],
)
def test_the_objective_is_that_of_loss_type_and_scale_rewards(resolved, loss, expected) -> None:
    config, _ = resolved({"loss": loss, "sampling": SAMPLING})
    objective = choose_objective(config)
    assert (objective.advantage, objective.normalisation) == expected
    known = loss.get("loss_type") in {"grpo", "dapo", "dr_grpo"} or expected[0] == "leave_one_out"
    assert ("preset" in config.objective.model_fields_set) == (
        known or ("bnpo" in loss.values() and loss["gradient_accumulation_steps"] == 1)
    )
    assert objective.constant == 24.0


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "cispo"},
        {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
        {"loss_type": "dapo", "beta": 0.04},
        {"loss_type": "grpo", "entropy_coef": 0.01, "epsilon_high": 0.28},
        {"loss_type": "dapo", "num_iterations": 2},
        {"loss_type": "dapo", "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"loss_type": "dr_grpo", "mask_truncated_completions": True},
    ],
)
def test_a_loss_that_no_preset_has_is_trls_with_its_settings(resolved, damaged, loss) -> None:
    known = {"beta": 0.0, "scale_rewards": "none", "delta": None}
    sidecar = {"loss": known | loss, "sampling": SAMPLING}
    config, (line,) = resolved(sidecar)
    found = config.objective
    assert (found.loss, found.advantage) == ("trl", "mean")
    known = {key: value for key, value in loss.items() if key != "num_iterations"}
    assert found.settings == known | {"max_completion_length": 24}  # no default of TRL's
    assert f'loss_type = "{loss["loss_type"]}"' in line
    assert choose_loss(config).settings["loss_type"] == loss["loss_type"]
    supplied, _ = resolved(sidecar, rollouts={"update": "u.parquet"})
    assert supplied.objective.advantage == "rollouts"  # a step may have parts of groups
    run = find_sidecar(damaged.adapter)
    mine, (line,) = resolved(sidecar, objective={"settings": {"beta": 1.0}})
    assert (mine.objective.loss, mine.objective.settings) == ("trl", found.settings | {"beta": 1.0})
    assert "beta" not in line
    assert [x for x in differences(mine, run, None) if "settings.beta is 1.0" in x]
    assert not [x for x in differences(config, run, None) if "objective.settings" in x]
    preset, _ = resolved(sidecar, objective={"preset": "dapo"})
    assert preset.objective.loss is None


def test_a_preset_that_is_set_determines_the_advantage(resolved) -> None:
    loss = {"loss_type": "dapo", "scale_rewards": "group"}
    config, _ = resolved({"loss": loss}, objective={"preset": "rloo"})
    assert choose_objective(config).advantage == "leave_one_out"
    config, _ = resolved({"loss": loss}, objective={"advantage": "rollouts"}, rollouts={"update": "u"})
    assert choose_objective(config)[:2] == ("rollouts", "token_mean")


def test_l_of_a_supplied_u_is_the_runs_length(resolved) -> None:
    loss, update = {"loss_type": "dr_grpo", "scale_rewards": "none"}, {"update": "u.parquet"}
    config, _ = resolved({"loss": loss, "sampling": SAMPLING}, rollouts=update)
    assert choose_objective(config).constant == 24.0
    config, _ = resolved(
        {"loss": loss, "sampling": SAMPLING}, rollouts=update, sampling={"max_new_tokens": 99}
    )
    assert choose_objective(config).constant == 24.0
    config, _ = resolved({"loss": loss}, rollouts=update)
    with pytest.raises(InputError, match=r"set objective\.constant"):
        choose_objective(config)


def test_l_is_the_runs_also_where_the_preset_is_set(resolved) -> None:
    """A run with shorter responses than in training divides by the training run's length."""
    sidecar = {"loss": {"loss_type": "dr_grpo", "scale_rewards": "none"}, "sampling": SAMPLING}
    short = {"max_new_tokens": 6}
    for mine in ({"preset": "dr_grpo"}, {"normalisation": "constant"}):
        config, (line,) = resolved(sidecar, objective=mine, sampling=short)
        assert choose_objective(config).constant == 24.0
        assert "objective.constant = 24" in line
    config, _ = resolved(sidecar, objective={"preset": "dr_grpo", "constant": 9.0}, sampling=short)
    assert choose_objective(config).constant == 9.0
    config, _ = resolved(sidecar, objective={"preset": "grpo"}, sampling=short)
    assert config.objective.constant is None


def test_bnpo_of_several_processes_is_not_one_mean(resolved) -> None:
    """Each process has its own mean over tokens; the mean of these is no mean over all."""
    one = {"loss_type": "bnpo", "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    for processes, preset in ((1, True), (2, False)):
        sizes = {"per_device_train_batch_size": 8, "generation_batch_size": 8 * processes}
        config, _ = resolved({"loss": one | sizes, "sampling": SAMPLING})
        assert ("preset" in config.objective.model_fields_set) == preset


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (STEP, 8),
        (STEP | {"steps_per_generation": 4}, 4),
        (STEP | {"generation_batch_size": 4}, 16),  # one prompt: no error over U, the default stays
        (STEP | {"generation_batch_size": 30}, 16),
        (STEP | {"steps_per_generation": None}, 16),
        ({"generation_batch_size": 32}, 16),
    ],
)
def test_the_prompts_of_a_step(resolved, loss, expected) -> None:
    assert expected == resolved({"loss": loss, "sampling": SAMPLING})[0].sampling.B_U


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"temperature": "hot"}, "'hot' for sampling.temperature: .*; set sampling.temperature"),
        ({"temperature": 0}, "0 for sampling.temperature"),
        ({"num_generations": 1}, "1 for sampling.G"),
        ({"max_completion_length": True}, "True for sampling.max_new_tokens"),
    ],
)
def test_a_value_that_cannot_be_is_refused_unless_the_key_is_set(resolved, sampling, said) -> None:
    with pytest.raises(InputError, match=said) as error:
        resolved({"sampling": sampling})
    assert "\n" not in str(error.value)
    mine = {"temperature": 1.0, "G": 2, "max_new_tokens": 9}
    assert resolved({"sampling": sampling}, sampling=mine)[1] == []


@pytest.mark.slow
def test_a_run_uses_and_writes_them(damaged, command) -> None:
    """Its own config.toml gives the same plan; what is set and differs is a warning as before."""
    with_sidecar(
        damaged,
        loss=STEP | {"loss_type": "dr_grpo", "scale_rewards": "group", "generation_batch_size": 8},
        sampling=SAMPLING | {"max_completion_length": 5, "num_generations": 2},
    )
    keys = ("sampling.G", "sampling.B_U", "sampling.max_new_tokens")
    given = {key: value for key, value in damaged.settings().items() if key not in keys}
    Path("c.toml").touch()
    outcome = command("run", "c.toml", *sets(given))
    assert outcome.status == 0, outcome.err
    written = tomllib.loads(Path("runs/probe/config.toml").read_text())
    assert written["sampling"]["temperature"] == 0.7
    assert [written["sampling"][key] for key in ("G", "B_U", "max_new_tokens")] == [2, 4, 5]
    expected = {"preset": "dr_grpo", "advantage": "mean_std", "constant": 5.0, "settings": {}}
    assert written["objective"] == expected
    assert written["optimizer"]["max_grad_norm"] == 0.3
    log = Path("runs/probe/run.log").read_text()
    assert log.count("as not set here") == 1
    assert "the run's loss_type" not in log
    results = json.loads(Path("runs/probe/results.json").read_text())
    assert results["conventions"]["objective"]["normalisation"] == "constant"
    assert results["conventions"]["temperature"] == 0.7
    assert results["counts"]["U_sequences"] == 8
    again = read_config(Path("runs/probe/config.toml"))
    lines: list[str] = []
    assert with_run_settings(again, lines.append) == again
    assert lines == []
    differs = given | {"objective.preset": "grpo", "sampling.temperature": 1.0}
    outcome = command("run", "c.toml", "--dry-run", *sets(differs))
    assert outcome.status == 0, outcome.err
    assert "loss_type was dr_grpo, objective.preset is grpo" in outcome.err
    assert "sampling had temperature 0.7, sampling.temperature is 1" in outcome.err
