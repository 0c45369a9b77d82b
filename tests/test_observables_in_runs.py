"""Observables in whole runs: what is written and printed, the defaults, and what is refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from funcprobe.adapters import results
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.rollouts import load_rollouts
from funcprobe.adapters.stages.observables import asked_for
from funcprobe.types import InputError
from support.checkpoints import sets

ALL = ["reward", "correct", "length", "stop", "kl_base", "kl_base_sampled", "own.py:digits"]
OWN = """
calls = []
def digits(prompts, completions, completion_ids, answer, **_):
    calls.append(len(completions))
    assert len(calls) == 1
    return [float(sum(map(str.isdigit, text))) for text in completions]

def some(completions, **_):
    return [None if "+" in text else len(text) for text in completions]

def one(completions, **_):
    return [1.0, *[None] * (len(completions) - 1)]

def wrong(completions, **_):
    return ["[bold]" for _ in completions]
"""


def of(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in document["observables"] if one["name"].endswith(name))


def test_every_observable_is_predicted_and_measured(ran):
    Path("own.py").write_text(OWN)
    given = {"sampling__B_E": 40, "measure__etas": [1e-7, 1e-5], "run__seed": 3}
    document, outcome = ran("-v", measure__observables=ALL, **given)
    names = [one["name"].rpartition(":")[2] for one in document["observables"]]
    assert names == [name.rpartition(":")[2] for name in ALL]
    drawn = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    texts, ids = drawn.response, drawn.response_ids
    mean = {
        "reward": sum(map(len, texts)) / 40,
        "correct": sum(len(text) >= 1 for text in texts) / 40,
        "length": sum(map(len, ids)) / 40,
        "stop": sum(y[-1] == 1 for y in ids) / 40,
        "digits": sum(sum(map(str.isdigit, text)) for text in texts) / 40,
    }
    assert drawn.reward == [float(len(text)) for text in texts]
    for name, value in mean.items():
        assert of(document, name)["at_theta"]["value"] == pytest.approx(value)
    for one in document["observables"]:
        assert [row["eta"] for row in one["sweep"]] == [1e-7, 1e-5]
        for row in one["sweep"]:
            slope = one["derivative"]["value"]
            assert row["predicted"]["value"] == pytest.approx(row["eta"] * slope, rel=1e-12)
    for name in ("reward", "length", "kl_base", "kl_base_sampled", "digits"):
        small, large = (abs(row["ratio"]["value"] - 1) for row in of(document, name)["sweep"])
        assert small < 1e-3, name
        assert large / small == pytest.approx(100, rel=0.1), name  # |ratio - 1| falls as eta
    assert outcome.out.startswith("The next step (lr 0.001), from ")
    clauses = re.findall(r"^  (\w+) +[+-]\d", outcome.out, re.MULTILINE)
    assert clauses == ["entropy", *names]
    assert "Other observables at eta = 1e-05" in outcome.out
    frame = results.load("runs/one").to_dataframe()
    for name, unit in (("reward", "reward"), ("kl_base", "nats per token"), ("digits", "digits")):
        assert frame.attrs["units"][name] == unit
        rows = of(document, name)["sweep"]
        assert list(frame[f"{name}_measured"]) == [row["measured"]["value"] for row in rows]
        assert (frame[f"{name}_predicted_low"] < frame[f"{name}_predicted_high"]).all()


@pytest.mark.slow
def test_by_default_reward_and_length_at_no_further_pass(ran):
    document, outcome = ran("-v", measure__next_lr=True)
    assert [one["name"] for one in document["observables"]] == ["reward", "length"]
    assert re.search(r"^  reward +[+-]", outcome.out, re.MULTILINE)
    assert "Other observables" in outcome.out
    passes = document["cost"]["total"]["passes"]
    none, outcome = ran("--fresh", "-v", measure__next_lr=True, measure__observables=[])
    assert none["observables"] == []
    assert none["cost"]["total"]["passes"] == passes
    assert "Other observables" not in outcome.out
    assert not re.search(r"^  (reward|length) +[+-]", outcome.out, re.MULTILINE)


def test_a_function_applies_to_some(ran):
    Path("own.py").write_text(OWN)
    document, outcome = ran("-v", measure__observables=["own.py:some"], sampling__B_E=40)
    drawn = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    lengths = [len(text) for text in drawn.response if "+" not in text]
    assert 2 < len(lengths) < 40
    some = of(document, "some")
    assert some["responses"] == len(lengths)
    assert some["baseline"] == "none"
    assert some["at_theta"]["value"] == pytest.approx(sum(lengths) / len(lengths))
    assert f"some ({len(lengths)} responses)" in outcome.out


@pytest.mark.slow
def test_a_constant_has_no_change(ran, checkpoint):
    given = {"reward__function": f"{checkpoint.rewards}:equal", "optimizer__rule": "adamw"}
    document, outcome = ran(**given)
    for row in of(document, "reward")["sweep"]:
        assert row["predicted"]["value"] == row["measured"]["value"] == 0
        assert row["ratio"] is None
    assert of(document, "reward")["at_theta"]["value"] == 0.5
    assert "  reward  +0.000 from 0.5, equal in all of E\n" in outcome.out


@pytest.mark.slow
def test_the_default_fails_no_run(ran, run_one):
    """A reward that E's responses break, and one that is known to be none of U's, are left out."""
    Path("own.py").write_text(
        "def own(completions, **_):\n    if len(completions) == 13:\n        raise KeyError('E')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    document, outcome = ran(reward__function="own.py:own", sampling__B_E=13)
    assert [one["name"] for one in document["observables"]] == ["length"]
    assert "the reward of E is not observed: reward" in outcome.err
    assert "KeyError" in outcome.err
    update = str(run_one / "rollouts/update.parquet")
    document, _ = ran(rollouts__update=update, reward__function="numeric")
    assert [one["name"] for one in document["observables"]] == ["length"]


@pytest.mark.slow
def test_a_supplied_E_has_its_rewards(ran, run_one):
    table = pq.read_table(run_one / "rollouts/eval.parquet").drop_columns(["reward"])
    pq.write_table(table, "without.parquet")
    pq.write_table(table.append_column("reward", [[1.0, None, *[0.0] * 10]]), "with.parquet")
    given = {"rollouts__update": str(run_one / "rollouts/update.parquet")}
    document, _ = ran(rollouts__eval="with.parquet", **given)
    assert of(document, "reward")["at_theta"]["value"] == pytest.approx(1 / 11)
    document, _ = ran(rollouts__eval="without.parquet", **given)
    assert [one["name"] for one in document["observables"]] == ["length"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["rewards"], "'rewards' is no observable: did you mean reward?"),
        (["length", "length"], "length occurs twice"),
        (["entropy"], "entropy is always observed"),
        (["own.py:nothing"], "own.py has no function 'nothing'"),
        (["own.py:wrong"], "returned str for response 0, expected a number"),
        (["own.py:one"], "applies to 1 responses of E"),
        (["absent.py:f"], "absent.py"),
        ("length", "a list is expected"),
    ],
)
def test_what_cannot_be_observed_is_refused_in_a_line(command, checkpoint, asked, why):
    Path("own.py").write_text(OWN)
    Path("c.toml").touch()
    given = checkpoint.settings() | {"measure.observables": asked}
    outcome = command("run", "c.toml", *sets(given))
    assert outcome.status == 2
    last = outcome.err.strip().splitlines()[-1]
    assert why in last
    assert not Path("runs").exists() or not Path("runs/probe").exists()


def test_a_model_trained_whole_has_no_base():
    config = Config.model_validate({"measure": {"observables": ["kl_base"]}})
    plan = SimpleNamespace(config=config, policy=SimpleNamespace(model=torch.nn.Linear(1, 1)))
    with pytest.raises(InputError, match="the whole model was trained"):
        asked_for(plan)


def test_paths_are_relative_to_the_configuration(command, checkpoint, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/own.py").write_text(OWN)
    (tmp_path / "here/c.toml").write_text('[measure]\nobservables = ["own.py:digits", "length"]\n')
    outcome = command("run", "here/c.toml", *sets(checkpoint.settings()))
    assert outcome.status == 0, outcome.err
    written = json.loads(Path("runs/probe/results.json").read_text())
    assert [one["name"] for one in written["observables"]] == ["here/own.py:digits", "length"]
    assert f"{tmp_path}/here/own.py:digits" in Path("runs/probe/config.toml").read_text()
