"""~ in paths: of a user that exists, and of none, in every place that takes a path."""

from pathlib import Path

import pytest

from funcprobe.adapters.machine.home import expanded
from funcprobe.types import InputError
from support.checkpoints import edit_json, sets
from support.commands import Outcome


def test_it_is_the_home_of_the_user(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/one")
    assert expanded("~/runs") == Path("/home/of/one/runs")
    assert expanded("~root").is_absolute()
    assert expanded("a/~/b") == Path("a/~/b")
    assert expanded("./~nobody") == Path("~nobody")


@pytest.mark.parametrize("name", ["~no-such-user/x", "~no-such-user", "~a\0b/x"])
def test_of_no_user(name) -> None:
    with pytest.raises(InputError, match=r"this machine has no user '(no-such-user|a\\x00b)': give"):
        expanded(name)


def says_so(outcome: Outcome) -> bool:
    (line,) = outcome.err.splitlines()
    return outcome.status == 2 and "~no-such-user/x: this machine has no user 'no-such-user'" in line


@pytest.mark.parametrize(
    "verb", ["report", "inspect", "cache", "compare", "sweep c.toml --checkpoints"]
)
def test_a_command_says_so(command, verb) -> None:
    Path("prompts.jsonl").touch()
    Path("c.toml").write_text('prompts.source = "prompts.jsonl"\n', "utf-8")
    assert says_so(command(*verb.split(), "~no-such-user/x"))


@pytest.mark.parametrize(
    "key", ["run.folder", "policy.checkpoint", "policy.base", "prompts.source", "optimizer.state"]
)
def test_a_key_says_so(command, checkpoint, key) -> None:
    Path("c.toml").touch()
    given = checkpoint.settings() | {key: "~no-such-user/x"}
    assert says_so(command("run", "c.toml", *sets(given)))
    assert not list(Path.cwd().glob("*no-such*"))


def test_a_strangers_adapter_says_so(command, damaged) -> None:
    edit_json(damaged.adapter / "adapter_config.json", base_model_name_or_path="~no-such-user/x")
    Path("c.toml").touch()
    given = {key: value for key, value in damaged.settings().items() if key != "policy.base"}
    assert says_so(command("run", "c.toml", *sets(given)))
