"""Runs where every advantage of U is 0: AdamW's step is predicted, other rules have none."""

import json
from pathlib import Path

import pytest

from funcprobe.adapters.rollouts import load_rollouts, save_rollouts
from funcprobe.adapters.rollouts.ragged import Ragged
from support.checkpoints import sets
from support.commands import refused

STILL = "Y = 0, and AdamW's step is by momentum and weight decay alone"


def equal(checkpoint) -> dict[str, object]:
    return {"reward.function": f"{checkpoint.rewards}:equal"}


@pytest.mark.slow
def test_the_step_is_momentum_and_decay(ran, checkpoint) -> None:
    results, outcome = ran("-v", **{k.replace(".", "__"): v for k, v in equal(checkpoint).items()})
    found = "all 4 groups of U have equal rewards, so that every advantage is 0"
    assert outcome.err.count(f"{found}: {STILL}") == 1
    assert "the checks of the gradient Y are left out" in outcome.err
    assert "Every advantage of U is 0: the step is by momentum and weight decay alone" in outcome.flat
    assert "no gradient in U, so no error over it: another U may have one" in outcome.flat
    checks = {one["name"]: one["passed"] for one in results["checks"]}
    assert all(checks.values())
    assert "gradient X is nonzero" in checks
    assert not {"gradient Y is nonzero", "Adam against identity"} & checks.keys()
    first = results["first_order"]
    assert first["from_update"]["value"] == first["se_over_U"]["value"] == 0
    assert "unknown for another U" in first["se_over_U"]["normalised_by"]
    assert first["interval_total"] == first["interval_given_U"]
    parts = first["from_momentum"]["value"] + first["from_weight_decay"]["value"]
    assert parts == pytest.approx(first["derivative"]["value"], rel=1e-9)
    assert results["counts"]["U_groups_without_gradient"] == results["counts"]["U_prompts"] == 4


@pytest.mark.parametrize("rule", ["sgd", "precondition"])
def test_rules_without_momentum_have_no_step(command, checkpoint, rule) -> None:
    given = checkpoint.settings() | equal(checkpoint) | {"optimizer.rule": rule}
    refused(command, given, f'every advantage is 0, and so is v by rule "{rule}": use other prompts')


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mean_std", "rollouts"])
def test_supplied_rollouts_without_advantage(probe, command, checkpoint, mode) -> None:
    probe("one")
    update = load_rollouts(Path("runs/one/rollouts/update.parquet"), 14, rewards=True)
    ones = slice(0, None, 3) if mode == "rollouts" else slice(None)  # one response per prompt
    kept = {k: v[ones] for k, v in update._asdict().items() if isinstance(v, list | Ragged)}
    count = len(kept["response"])
    save_rollouts(
        update._replace(**kept)._replace(reward=[0.3] * count, advantage=[0.0] * count),
        Path("still.parquet"),
    )
    given = {"rollouts.update": "still.parquet", "objective.advantage": mode, "run.name": "still"}
    given = checkpoint.settings() | given
    planned = command("run", "c.toml", "--dry-run", *sets(given))
    assert (planned.status, planned.err.count(STILL)) == (0, 1)
    checked = command("check", "c.toml", *sets(given))
    assert (checked.status, checked.err.count(STILL)) == (0, 1)
    ended = command("run", "c.toml", *sets(given))
    assert (ended.status, ended.err.count(STILL)) == (0, 1)
    found = json.loads(Path("runs/still/results.json").read_text())
    assert found["norms"]["Y"]["value"] == 0
    assert found["clip_coefficient"] == 1


@pytest.mark.slow
def test_some_groups_of_equal_rewards_are_as_ever(ran, checkpoint) -> None:
    checkpoint_rewards = Path("own.py")
    checkpoint_rewards.write_text(
        "def some(prompts, completions, **_):\n"
        "    return [0.0 if p[0] == '3' else float(len(c)) for p, c in zip(prompts, completions)]\n"
    )
    results, outcome = ran(reward__function="own.py:some", sampling__B_U=6)
    assert 0 < results["counts"]["U_groups_without_gradient"] < 6
    assert STILL not in outcome.err
    assert "gradient Y is nonzero" in {one["name"] for one in results["checks"]}


@pytest.mark.slow
def test_a_positional_state_is_not_confirmed_by_a_gradient_of_zero(command, checkpoint) -> None:
    given = checkpoint.settings() | equal(checkpoint)
    Path("c.toml").touch()
    accepted = command("check", "c.toml", *sets(given))
    assert accepted.status == 0
    said = "the gradients do not confirm the optimizer state's order: every advantage is 0, and so is Y"
    assert said in accepted.err
    refused(
        command,
        given | {"optimizer.accept_positional": False},
        "neither confirm nor contradict: every advantage is 0, and so is Y",
    )
