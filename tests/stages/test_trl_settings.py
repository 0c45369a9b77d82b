"""What of a TRL run's loss a predicted step does not have, by its sidecar and its rollouts."""

from pathlib import Path
from typing import Any

import pytest

from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.optimizer import Sidecar
from funcprobe.adapters.rollouts import Rollouts
from funcprobe.adapters.stages.chosen_loss import choose_loss
from funcprobe.adapters.stages.differences import differences
from funcprobe.adapters.stages.trl_settings import trl_settings
from funcprobe.types import InputError


def sidecar(sampling: dict[str, Any] | None = None, **loss: Any) -> Sidecar:
    return Sidecar(Path("s.json"), [], None, 5, None, {"loss_type": "dapo"} | loss, sampling or {}, {})


def update(**columns: Any) -> Rollouts:
    """Two responses, with further columns."""
    tokens = [[3, 1], [4, 1]]
    return Rollouts([0, 1], ["", ""], ["", ""], tokens, tokens, ["stop"] * 2, 1.0)._replace(**columns)


def config(rollouts: str | None = None, **objective: Any) -> Config:
    return Config.model_validate({"objective": objective, "rollouts": {"update": rollouts}})


def test_what_is_trls_default_is_not_repeated() -> None:
    """None of epsilon_high and steps_per_generation stands for another setting."""
    run = sidecar(
        epsilon=0.3, epsilon_high=0.3, gradient_accumulation_steps=4, steps_per_generation=4, beta=0.0
    )
    assert trl_settings(run) == {"loss_type": "dapo", "epsilon": 0.3, "gradient_accumulation_steps": 4}
    run = sidecar(epsilon=0.3, epsilon_high=0.2, steps_per_generation=2)
    assert trl_settings(run) == {
        "loss_type": "dapo",
        "epsilon": 0.3,
        "epsilon_high": 0.2,
        "steps_per_generation": 2,
    }


def test_none_is_what_it_stands_for() -> None:
    """The settings of a run that leave out what equals another are the run's."""
    run = sidecar(
        epsilon=0.3, epsilon_high=0.3, gradient_accumulation_steps=4, steps_per_generation=4, beta=0.1
    )
    mine = {"loss_type": "dapo", "epsilon": 0.3, "gradient_accumulation_steps": 4, "beta": 0.1}
    assert differences(config("u.parquet", loss="trl", settings=mine), run, update()) == []
    (line,) = differences(config("u.parquet", loss="trl", settings=mine | {"epsilon_high": 0.4}), run)
    assert "epsilon_high was 0.3, objective.settings.epsilon_high is 0.4" in line


OLD = {"old_logp": [[-1.0, -1.0]] * 2}


@pytest.mark.parametrize(
    ("loss", "sampling", "columns", "said"),
    [
        ({"num_iterations": 2}, {}, OLD, "served 2 steps"),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 1}, {}, OLD, "served 4 steps"),
        ({"beta": 0.1, "sync_ref_model": True}, {}, {"ref_logp": [[-1.0, -1.0]] * 2}, "sync_ref_model"),
        (
            {"entropy_coef": 0.1, "use_adaptive_entropy": True},
            {},
            {"entropy_coef": 0.2},
            "adapted from",
        ),
    ],
)
def test_what_only_rollouts_know_is_said_without_them(loss, sampling, columns, said) -> None:
    run = sidecar(sampling, **loss)
    chosen = {"loss": "trl", "settings": trl_settings(run)}
    for U in (None, update()):
        (line,) = differences(config(U and "u.parquet", **chosen), run, U)
        assert said in line
    assert differences(config("u.parquet", **chosen), run, update(**columns)) == []


def test_a_sampler_that_is_not_the_policy_is_said_where_u_is_sampled() -> None:
    run = sidecar({"use_vllm": True})
    chosen = {"loss": "trl", "settings": trl_settings(run)}
    (line,) = differences(config(**chosen), run)
    assert "sampled by vLLM" in line
    assert differences(config("u.parquet", **chosen), run, update()) == []


def test_columns_that_a_preset_does_not_use_are_said() -> None:
    masked = {"loss_mask": [[True, False], [True, True]]}
    (line,) = differences(config("u.parquet"), None, update(**OLD, **masked))
    assert 'has old_logp, loss_mask, which a preset does not use: set objective.loss = "trl"' in line
    unmasked = {"loss_mask": [[True, True]] * 2, "entropy_coef": 0.0}
    assert differences(config("u.parquet"), None, update(**unmasked)) == []


def test_a_loss_of_ones_own_is_to_be_compared() -> None:
    (line,) = differences(config(loss="mine.py:f"), sidecar())
    assert "loss_type was dapo, objective.loss is mine.py:f: whether they are equal" in line


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            {"loss": "cispo"},
            'a loss_type of TRL: set loss = "trl" and settings = { loss_type = "cispo" }',
        ),
        ({"loss": "trl", "settings": {"bta": 0.1}}, "has no bta: did you mean beta?"),
        ({"loss": "trl", "settings": {"num_iterations": 2}}, "several iterations are in recorded"),
        ({"loss": "trl", "settings": {"kl_loss_coef": 0.1}}, 'it is one of objective.loss = "verl"'),
        ({"loss": "verl", "settings": {"beta": 0.1}}, 'it is one of objective.loss = "trl"'),
        ({"loss": "trl", "settings": {"beta": "0.1"}}, "beta is '0.1'"),
        ({"loss": "trl", "settings": {"beta": True}}, "beta is True"),
        ({"loss": "trl", "settings": {"beta": float("inf")}}, "beta is inf, expected a finite"),
        ({"loss": "trl", "settings": {"epsilon": -1.0}}, "expected at least 0"),
        ({"loss": "trl", "settings": {"world_size": 0}}, "world_size is 0"),
        ({"loss": "trl", "settings": {"gradient_accumulation_steps": 500}}, "raise sampling.B_U"),
    ],
)
def test_settings_that_cannot_be(objective, said) -> None:
    with pytest.raises(InputError, match=r"objective|epsilon|sampling") as error:
        choose_loss(config(**objective))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_infinity_is_a_bound() -> None:
    chosen = config(loss="trl", settings={"delta": float("inf")})
    assert chosen.objective.settings == {"delta": "inf"}  # as every format can have it
    found = choose_loss(chosen)
    assert found is not None
    assert found.settings["delta"] == float("inf")
