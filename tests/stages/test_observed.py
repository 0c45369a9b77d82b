"""Rewards of E's responses: by the run's function, of a supplied E's column or of its other columns."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.rollouts import load_rollouts
from funcprobe.adapters.stages.batches import sample
from funcprobe.adapters.stages.observed import rewards_of_E
from funcprobe.adapters.stages.plan import load
from funcprobe.adapters.store import Stages
from funcprobe.types import InputError
from support.checkpoints import sets


@pytest.fixture
def rewards(checkpoint, tmp_path, monkeypatch):
    """Rewards of E under changed settings, with E's rollouts; a__b=1 sets a.b."""
    monkeypatch.chdir(tmp_path)

    def call(**changes: Any) -> tuple[list[float], Any]:
        given = checkpoint.settings() | {key.replace("__", "."): x for key, x in changes.items()}
        Path("c.toml").touch()
        plan = load(read_config(Path("c.toml"), sets(given)[1::2]), Narrator())
        batches = sample(plan, Stages(None), Narrator())
        found = rewards_of_E(plan, batches, Narrator())
        assert found.dtype == torch.float64
        return found.tolist(), batches.eval_rollouts

    return call


def supplied(run_one: Path, name: str = "E.parquet", **columns: list[Any]) -> str:
    """E of the finished run as a file of its own, with more columns."""
    table = pq.read_table(run_one / "rollouts/eval.parquet").drop_columns(["reward"])
    for column, values in columns.items():
        table = table.append_column(column, [values])
    pq.write_table(table, name)
    return name


def test_a_sampled_E_is_scored_as_U_is(rewards, checkpoint):
    found, drawn = rewards()
    assert found == [float(len(text)) for text in drawn.response]
    answers = [json.loads(line)["answer"] for line in checkpoint.prompts.read_text().splitlines()]
    Path("own.py").write_text("def own(answer, **_):\n    return [float(a) for a in answer]\n")
    found, drawn = rewards(reward__function="own.py:own")  # the row is that of the response's prompt
    assert found == [float(answers[i]) for i in drawn.prompt_index]
    assert len(set(found)) > 1


def test_a_sampled_E_beside_a_supplied_U_is_scored_too(rewards, run_one):
    found, drawn = rewards(rollouts__update=str(run_one / "rollouts/update.parquet"))
    assert found == [float(len(text)) for text in drawn.response]


def test_a_supplied_E_has_the_rewards_of_its_column(rewards, run_one):
    column = [*map(float, range(11)), None]
    found, _ = rewards(rollouts__eval=supplied(run_one, reward=column))
    assert found[:11] == column[:11]
    assert found[11] != found[11]  # NaN: not applicable
    for bad, why in (
        ([*column[:11], float("inf")], "reward inf"),
        ([float("nan")] * 12, "no response"),
    ):
        with pytest.raises(InputError, match=why):
            rewards(rollouts__eval=supplied(run_one, reward=bad))


def test_a_supplied_E_without_rewards_is_scored_by_its_other_columns(rewards, run_one):
    found, _ = rewards(rollouts__eval=supplied(run_one))
    own = load_rollouts(run_one / "rollouts/eval.parquet", 14, rewards=False)
    assert found == [float(len(text)) for text in own.response]
    Path("own.py").write_text("def own(prompts, answer, **_):\n    return [2.0 * a for a in answer]\n")
    E, U = supplied(run_one, answer=[*range(12)]), str(run_one / "rollouts/update.parquet")
    found, _ = rewards(rollouts__eval=E, rollouts__update=U, reward__function="own.py:own")
    assert found == [2.0 * i for i in range(12)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"reward__function": "numeric"}, "has no column 'answer'"),
        ({"reward__conversational": True}, "needs messages"),
        ({"reward__function": "raises"}, "no such luck"),
    ],
)
def test_a_supplied_E_that_nothing_scores_is_one_line(rewards, checkpoint, run_one, changes, why):
    if changes.get("reward__function") == "raises":
        changes = {"reward__function": f"{checkpoint.rewards}:raises"}
    E, U = supplied(run_one), str(run_one / "rollouts/update.parquet")
    with pytest.raises(InputError, match=why) as raised:
        rewards(rollouts__eval=E, rollouts__update=U, **changes)
    assert "\n" not in str(raised.value)
    assert "E is supplied without rewards" in str(raised.value)
    assert f"add a column reward to {E}" in str(raised.value)
