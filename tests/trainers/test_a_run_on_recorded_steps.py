"""`funcprobe run` on a step that TRL took, with its sidecar alone: its loss, logs and direction."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from funcprobe import tree
from support.checkpoints import sets
from support.slow import first
from support.trl_cases import GENERAL, LAYOUTS
from support.trl_training import train

SECOND = LAYOUTS[GENERAL] | {"epsilon": 0.001}


@pytest.mark.parametrize(
    ("settings", "logged"),
    first(
        1,
        [
            (
                SECOND | {"loss_type": "dapo", "beta": 0.04, "entropy_coef": 0.01},
                ("loss", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "policy_loss"),
            ),
            (
                SECOND
                | {"loss_type": "cispo", "epsilon_high": 1.0, "mask_truncated_completions": True},
                ("loss", "entropy", "cispo_clip_ratio"),
            ),
        ],
    ),
    ids=["dapo with KL and bonus", "cispo"],
)
def test_the_step_its_loss_and_its_logs(settings, logged, checkpoint, command, tmp_path) -> None:
    """Logged numbers to the digits that TRL prints; v by float32, as the training is: 1e-4."""
    step = train(checkpoint, tmp_path / "out", **settings)
    given = {
        "policy.checkpoint": str(step.before),
        "rollouts.update": str(step.recorded),
        "prompts.source": checkpoint.settings()["prompts.source"],
        "sampling.B_E": 8,
        "sampling.max_new_tokens": 4,
        "measure.etas": [1e-5],
        "run.folder": "runs",
    }
    Path("c.toml").touch()
    outcome = command("run", "c.toml", "-v", *sets(given))
    assert outcome.status == 0, outcome.err
    results = json.loads(Path("runs/probe/results.json").read_text())
    found = results["loss"]
    assert (found["name"], found["settings"]["loss_type"]) == ("trl", settings["loss_type"])
    assert results["unlike_the_run"] == []
    assert results["first_order"]["se_over_U"]["value"] == 0  # the step's own batch
    for name in logged:
        # The Trainer rounds its loss to six digits after the point; the others are of float32.
        mine = found["at_theta"]["value"] if name == "loss" else found["metrics"][name]
        assert math.isclose(mine, step.logged[name], rel_tol=2e-5, abs_tol=1e-6), name
    assert step.logged.get("kl", 1.0) > 0
    v = {n: t.double() for n, t in load_file("runs/probe/direction.safetensors").items()}
    assert v.keys() == step.taken.keys()
    for name, taken in step.taken.items():
        assert tree.norm({name: v[name] - taken}) < 1e-4 * tree.norm({name: taken})
    assert "Loss of U at theta, trl" in outcome.flat
