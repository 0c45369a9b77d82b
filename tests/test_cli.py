"""The command line: usage, what is written and printed, and what a dry run finds before."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from funcprobe.adapters import run as run_module
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.sampling import batched as sampling_module
from support.checkpoints import sets
from support.commands import Outcome, process

pytestmark = pytest.mark.usefixtures("offline")

# Usage


@pytest.mark.parametrize("arguments", [(), ("run", "--zork", "c.toml"), ("zork",), ("run",)])
def test_usage_errors(command, arguments) -> None:
    outcome = command(*arguments)
    assert outcome.status == 2
    assert "Usage" in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ((), ("run", "whatif", "check", "init", "without taking the step")),
        (("whatif",), ("--rule", "--mask", "entropy=VALUE", "--with", "--eta", "same E and U")),
        (("run",), ("--set", "KEY=VALUE", "--dry-run", "--fresh", "sampling.B_E=64", "CFG.TOML")),
        (("check",), ("sanity checks", "write nothing", "Exit status 1", "--set")),
        (("init",), ("every key", "default")),
        (("cache",), ("--clear", "--older-than", "run.cache_size", "runs in progress")),
    ],
)
def test_help_names_what_there_is(command, verb, words) -> None:
    outcome = command(*verb, "--help")
    assert outcome.status == 0
    text = " ".join(outcome.out.replace("│", " ").split())
    for word in words:
        assert word in text


def test_help_waits_for_no_heavy_library(tmp_path) -> None:
    heavy = "{'transformers', 'peft', 'datasets', 'scipy', 'pyarrow'}"
    script = f"""
        import atexit, sys
        from funcprobe.adapters.cli import main
        atexit.register(lambda: print({heavy} & sys.modules.keys()))
        main()
    """
    done = process(script, "run", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("set()\n")


def test_init_writes_the_defaults_and_overwrites_nothing(command) -> None:
    outcome = command("init", "new.toml")
    assert outcome.status == 0
    assert "wrote new.toml" in outcome.out
    assert read_config(Path("new.toml")) == Config()  # run.folder too: "runs", in this folder
    Path("new.toml").write_text("mine")
    outcome = command("init", "new.toml")
    assert outcome == Outcome(2, "", "funcprobe: new.toml exists: give another name, or delete it\n")
    assert Path("new.toml").read_text() == "mine"
    outcome = command("init", "no/such/folder/c.toml")
    assert outcome.status == 2
    assert "no/such/folder/c.toml: there is no folder no/such/folder" in outcome.err
    assert "is a folder: give the name of a file in it" in command("init", ".").err


# Dry run and check


def test_a_dry_run_plans_and_writes_nothing(command, checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(sampling_module, "_generate", lambda *_: pytest.fail("something was sampled"))
    Path("c.toml").touch()
    outcome = command("run", "c.toml", "--dry-run", *sets(checkpoint.settings()))
    assert outcome.status == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["c.toml"]
    for words in (
        "12 prompts drawn from 6",
        "4 distinct prompts, 3 responses each",
        "longest prompt: 5 tokens",
        "0.001",
    ):
        assert words in outcome.out
    assert "runs/probe; nothing was sampled or written" in outcome.out


def test_a_dry_run_refuses_what_a_run_would(command, checkpoint, other) -> None:
    Path("c.toml").touch()
    given = checkpoint.settings() | {"policy.base": str(other["wider"].base)}
    outcome = command("run", "c.toml", "--dry-run", *sets(given))
    assert (outcome.status, outcome.out) == (2, "")
    assert "has shape" in outcome.err


def test_a_dry_run_refuses_a_state_that_makes_no_step(command, damaged) -> None:
    """Before anything is sampled: coverage alone would let these through."""
    Path("c.toml").touch()
    file = damaged.adapter / "optimizer.pt"
    whole = torch.load(file, weights_only=True)

    def refused(**overrides: Any) -> str:
        outcome = command("run", "c.toml", "--dry-run", *sets(damaged.settings() | overrides))
        assert (outcome.status, outcome.out) == (2, "")
        return outcome.err.splitlines()[-1]

    entry = whole["state"].pop(0)
    torch.save(whole, file)
    assert "exp_avg of every parameter, 1 of 12 have none" in refused()
    entry["exp_avg_sq"][0] = -1
    whole["state"][0] = entry
    torch.save(whole, file)
    assert "contains a negative or non-finite number" in refused()


def test_a_dry_run_refuses_a_missing_answer_column(command, checkpoint) -> None:
    Path("c.toml").touch()
    given = {"reward.function": "numeric", "reward.answer_column": "answr"}
    outcome = command("run", "c.toml", "--dry-run", *sets(checkpoint.settings() | given))
    assert outcome.status == 2
    assert "no column 'answr'" in outcome.err
    assert "did you mean 'answer'?" in outcome.err
    assert "prompt" in outcome.err.partition("its columns are: ")[2]  # which no reward is given


@pytest.mark.parametrize(("written", "warned"), [(2, False), (7, True)])
def test_a_state_of_another_checkpoint_is_pointed_out(command, damaged, written, warned) -> None:
    Path("c.toml").touch()
    (damaged.adapter / "trainer_state.json").write_text(json.dumps({"global_step": written}))
    outcome = command("run", "c.toml", "--dry-run", *sets(damaged.settings()))
    assert outcome.status == 0
    assert ("the optimizer state has taken 2 steps but" in outcome.err) == warned
    (damaged.adapter / "trainer_state.json").write_text("[]")
    outcome = command("run", "c.toml", "--dry-run", *sets(damaged.settings()))
    assert outcome.status == 2
    assert "has no global_step" in outcome.err


def test_a_rule_that_no_trainer_follows_is_not_called_the_next_step(command, checkpoint) -> None:
    Path("c.toml").touch()
    given = {"optimizer.rule": "precondition", "optimizer.max_update": 0.01}
    outcome = command("run", "c.toml", *sets(checkpoint.settings() | given))
    assert outcome.status == 0
    assert outcome.out.startswith('A step along v of rule "precondition" (lr 0.001), from ')
    assert "next step" not in outcome.out


def test_check_writes_nothing_and_fails_by_its_status(command, checkpoint, monkeypatch) -> None:
    Path("c.toml").touch()
    outcome = command("check", "c.toml", "--verbose", *sets(checkpoint.settings()))
    assert outcome.status == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["c.toml"]
    # What is advised on follows the draw of E: a row of the table, and a line below it.
    advised = outcome.out.count("suspect") // 2
    assert f"sanity checks: {12 - advised} of 12 passed" in outcome.out
    assert outcome.out.count("pass") == 12 - advised + 1
    assert "FAIL" not in outcome.out
    gradients_reach = run_module.checks.gradients_reach
    monkeypatch.setattr(
        run_module.checks,
        "gradients_reach",
        lambda name, grads: gradients_reach(name, grads)._replace(passed=name != "X"),
    )
    outcome = command("check", "c.toml", *sets(checkpoint.settings()))
    assert outcome.status == 1
    assert outcome.out.count("FAIL") == 1
    assert outcome.out.count("pass") == 1  # the count, before those that failed
    assert "FAIL: gradient X is nonzero: " in outcome.flat
    assert "usual cause: the loss does not depend on the adapter" in outcome.flat
    monkeypatch.setattr(run_module.checks, "gradients_reach", gradients_reach)
    in_proportion = run_module.checks.gradient_in_proportion
    monkeypatch.setattr(
        run_module.checks,
        "gradient_in_proportion",
        lambda scale: in_proportion(scale)._replace(passed=False),
    )
    outcome = command("check", "c.toml", *sets(checkpoint.settings()))
    assert outcome.status == 0
    assert "suspect: gradient on U against Adam's second moments: " in outcome.flat


def test_version(command) -> None:
    outcome = command("--version")
    assert outcome.status == 0
    assert outcome.out == f"funcprobe {metadata.version('funcprobe')}\n"


def test_a_mistyped_checkpoint_is_not_looked_up_on_the_hub(command, checkpoint) -> None:
    Path("c.toml").touch()
    given = checkpoint.settings() | {"policy.checkpoint": "out/checkpoint-21"}
    outcome = command("run", "c.toml", *sets(given))
    assert outcome.status == 2
    assert outcome.err == (
        "funcprobe: out/checkpoint-21: no such folder; set policy.checkpoint to a checkpoint folder\n"
    )


# What is printed


def numbers(line: str) -> list[tuple[float, float]]:
    """The numbers with their errors in a line: (-5.6 ± 2.5)e-02."""
    found = re.findall(r"\(([+-][\d.]+) ± ([\d.]+)\)(e[+-]\d+)", line)
    return [(float(x + power), float(half + power)) for x, half, power in found]


def test_the_table_and_the_summary(command, checkpoint) -> None:
    Path("c.toml").touch()
    given = checkpoint.settings() | {"run.name": "one", "run.report": True}
    outcome = command("run", "c.toml", "-v", *sets(given))
    assert outcome.status == 0
    document = json.loads(Path("runs/one/results.json").read_text())
    for row in document["sweep"]:
        marked = ("next lr " if row["is_next_lr"] else "") + f"{row['eta']:.3g}"
        (line,) = [x for x in outcome.out.splitlines() if x.strip().startswith(f"{marked} ")]
        assert f" {row['ratio']['value']:.4f} " in line
        pairs = {"predicted": "interval_total", "measured": "measured_interval_given_U"}
        for shown, (key, interval) in zip(numbers(line), pairs.items(), strict=True):
            half = (row[interval]["high"] - row[interval]["low"]) / 2
            assert shown == pytest.approx((row[key]["value"], half), abs=0.05 * half)
        assert f"{row['second_order']['value']:+.4e}" in line
        assert row["verdict"] in line
        first, eta = document["first_order"], row["eta"]
        for error in ("se_total", "se_given_U"):
            assert row[error]["value"] == pytest.approx(eta * first[error]["value"], rel=1e-12)
        assert f"{row['se_total']['value']:.1e}" != f"{row['se_given_U']['value']:.1e}"
    assert sum(row["is_next_lr"] for row in document["sweep"]) == 1
    assert "nats per token" in outcome.out
    assert "report: runs/one/report.html\n" in outcome.out
    passed = sum(check["passed"] for check in document["checks"])
    assert f"sanity checks: {passed} of 12 passed" in outcome.out
    assert "wrote runs/one in" in outcome.err
    first, second = Path("runs/one/run.log").read_text().splitlines()[:2]
    assert first.startswith("import: ")
    assert second.startswith("load: ")
