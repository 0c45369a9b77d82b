"""Runs on a checkpoint that was trained with dropout: the warning, and step.masks."""

import json
from pathlib import Path

import pytest

from support.checkpoints import Checkpoint, edit_json, sets
from support.commands import refused
from support.sidecars import with_sidecar

WARNING = (
    "warning: dropout in training (lora_dropout = 0.3): the trainer's gradient has random masks, so "
    "that no probe can repeat its step, and v here has none: set step.masks = 8 for their mean and "
    "spread, or train without dropout"
)


@pytest.fixture
def dropped(damaged) -> Checkpoint:
    """The checkpoint, with the lora_dropout of its run."""
    edit_json(damaged.adapter / "adapter_config.json", lora_dropout=0.3)
    return damaged


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if "dropout in training" in line]


@pytest.mark.slow
def test_it_is_said_and_changes_nothing_else(probe, command, dropped, checkpoint) -> None:
    Path("c.toml").touch()
    outcome = command("run", "c.toml", "--dry-run", *sets(dropped.settings()))
    assert outcome.status == 0
    (line,) = said(outcome.err)
    assert line.endswith(WARNING)
    with_dropout, without = probe("one", of=dropped), probe("two")
    assert with_dropout["first_order"] == without["first_order"]
    assert with_dropout["first_order"]["masks"] is None
    plain = command("run", "c.toml", "--dry-run", *sets(checkpoint.settings()))
    assert said(plain.err) == []


@pytest.mark.slow
def test_masks_give_a_mean_and_a_spread(command, probe, dropped) -> None:
    Path("c.toml").touch()
    given = dropped.settings() | {"run.name": "one", "step.masks": 4}
    outcome = command("run", "c.toml", "-v", *sets(given))
    assert outcome.status == 0, outcome.err
    (line,) = said(outcome.err)
    assert line.endswith(
        "dropout in training (lora_dropout = 0.3): Y and v are means over 4 masks, where the trainer's "
        "step has one; 4 gradients of U instead of 1"
    )
    assert "Dropout: v is the mean over 4 masks" in outcome.flat
    assert "over the dropout mask of one step" in outcome.flat
    found = json.loads(Path("runs/one/results.json").read_text())
    first, masks = found["first_order"], found["first_order"]["masks"]
    assert masks["count"] == 4
    assert masks["se_one_step"]["value"] == pytest.approx(masks["spread"]["value"] * (5 / 4) ** 0.5)
    assert masks["interval_one_step"]["degrees_of_freedom"] == 3
    squares = [first[key]["value"] ** 2 for key in ("se_given_U", "se_over_U")]
    total = sum(squares) + masks["se_one_step"]["value"] ** 2
    assert first["se_total"]["value"] == pytest.approx(total**0.5)
    assert masks["interval_one_step"]["low"] < masks["interval_one_step"]["high"]
    parts = sum(first[f"from_{part}"]["value"] for part in ("update", "momentum", "weight_decay"))
    assert parts == pytest.approx(first["derivative"]["value"], rel=1e-8)
    passes = {stage["stage"]: stage["passes"] for stage in found["cost"]["stages"]}
    assert passes["gradient on U"] == {"U": 4.0}
    assert passes["first order"] == {"E": 2.0, "U": 2.0}  # along P X, and along Y, which is clipped
    assert all(one["passed"] or one["advisory"] for one in found["checks"])
    # The measured change is along the same mean.
    assert found["sweep"][0]["ratio"]["value"] == pytest.approx(1, abs=1e-2)
    # Stored, and another for another number of masks, seed, and for none.
    again = probe("again", of=dropped, step__masks=4)
    assert again["first_order"] == first
    assert again["cost"]["total"]["results_computed"] == 0
    others = [
        probe("more", of=dropped, step__masks=5),
        probe("none", of=dropped),
    ]
    values = {one["first_order"]["derivative"]["value"] for one in (found, *others)}
    assert len(values) == 3


@pytest.mark.slow
def test_all_of_it_in_check(command, dropped) -> None:
    Path("c.toml").touch()
    outcome = command("check", "c.toml", *sets(dropped.settings() | {"step.masks": 2}))
    assert outcome.status == 0, outcome.err


def test_a_run_that_disabled_dropout_has_none(command, dropped) -> None:
    with_sidecar(dropped, loss={"disable_dropout": True})
    Path("c.toml").touch()
    outcome = command("run", "c.toml", "--dry-run", *sets(dropped.settings()))
    assert (outcome.status, said(outcome.err)) == (0, [])
    refused(
        command, dropped.settings() | {"step.masks": 8}, "but the run disabled dropout: set it to 0"
    )


@pytest.mark.slow
def test_dropout_of_the_base_is_said_without_promising_masks(command, dropped) -> None:
    edit_json(dropped.base / "config.json", attention_dropout=0.1)
    Path("c.toml").touch()
    outcome = command("run", "c.toml", "--dry-run", *sets(dropped.settings()))
    (line,) = said(outcome.err)
    assert "(lora_dropout = 0.3, attention_dropout = 0.1)" in line
    assert line.endswith("and v here has none: train without dropout")
    refused(
        command,
        dropped.settings() | {"step.masks": 8},
        "the model is trained with attention_dropout = 0.1, of which no mask can be drawn",
    )
    edit_json(dropped.adapter / "adapter_config.json", lora_dropout=0.0)
    outcome = command("run", "c.toml", "--dry-run", *sets(dropped.settings()))
    (line,) = said(outcome.err)
    assert "dropout in training (attention_dropout = 0.1)" in line


def test_masks_that_cannot_be(command, checkpoint) -> None:
    refused(command, checkpoint.settings() | {"step.masks": 1}, "1 mask has no spread")
    refused(command, checkpoint.settings() | {"step.masks": -1}, "step.masks")
    refused(
        command,
        checkpoint.settings() | {"step.masks": 8},
        "step.masks = 8, but neither adapter nor base has dropout: set it to 0",
    )
