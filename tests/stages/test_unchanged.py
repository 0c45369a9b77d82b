"""A checkpoint that is being written is noticed, and results of no version are not written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from funcprobe.adapters.stages import unchanged
from support.checkpoints import edit_json, sets
from support.commands import left_in
from support.slow import first

QUICK = {"measure.next_lr": False, "measure.etas": [1e-4], "sampling.max_new_tokens": 2}


@pytest.fixture
def while_loading(monkeypatch) -> Callable[[Callable[[], object]], None]:
    """Calls a function in the middle of loading: the policy is there, the optimizer's state is not."""
    plan = unchanged.load.__globals__

    def at(act: Callable[[], object]) -> None:
        load_step = plan["load_step"]

        def acting(*args: Any) -> Any:
            act()
            return load_step(*args)

        monkeypatch.setitem(plan, "load_step", acting)

    return at


def rewritten(path: Path, more: bytes = b"") -> None:
    """As a trainer that saves again: the same name, perhaps the same bytes."""
    path.write_bytes(path.read_bytes() + more)


CHANGES = {
    "the adapter again": lambda c: rewritten(c.adapter / "adapter_model.safetensors"),
    "another size": lambda c: rewritten(c.adapter / "adapter_config.json", b" "),
    "the state again": lambda c: rewritten(c.adapter / "optimizer.pt"),
    "a file that comes later": lambda c: (c.adapter / "trainer_state.json").write_text("{}"),
    "one that goes": lambda c: (c.adapter / "extra.json").unlink(),
    "the base": lambda c: edit_json(c.base / "config.json", any_key=1),
    "a shard of the state": lambda c: (c.adapter / "shards/rank_0.pt").write_bytes(b""),
    "another file of the same facts": lambda c: os.replace(
        shutil.copy2(c.adapter / "optimizer.pt", c.adapter / "tmp"), c.adapter / "optimizer.pt"
    ),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_while_it_is_read_is_refused(command, damaged, while_loading, how) -> None:
    Path("c.toml").touch()
    (damaged.adapter / "extra.json").write_text("{}")
    (damaged.adapter / "shards").mkdir()
    while_loading(lambda: CHANGES[how](damaged))
    outcome = command("run", "c.toml", *sets(damaged.settings() | QUICK))
    assert (outcome.status, outcome.out) == (2, "")
    last = outcome.err.splitlines()[-1]
    assert "changed while it was read" in last
    assert "wait until it is complete, or give a finished checkpoint" in last
    assert left_in(Path("runs")) == []


def test_what_is_incomplete_because_it_is_being_written_is_said_so(
    command, damaged, while_loading
) -> None:
    Path("c.toml").touch()
    while_loading(lambda: (damaged.adapter / "optimizer.pt").write_bytes(b"half"))
    outcome = command("run", "c.toml", *sets(damaged.settings() | QUICK))
    assert outcome.status == 2
    assert "optimizer.pt changed while it was read (" in outcome.err.splitlines()[-1]
    # And what is wrong without any change is said as before.
    outcome = command("run", "c.toml", *sets(damaged.settings() | QUICK))
    assert outcome.status == 2
    again = command("run", "c.toml", *sets(damaged.settings() | QUICK))
    assert "changed while" in again.err or "optimizer.pt" in again.err


@pytest.mark.parametrize("verb", first(1, ["run", "whatif"]))
def test_a_change_until_the_results_are_written(command, damaged, monkeypatch, verb) -> None:
    """Refused; but what was only touched or linked, logs beside it, and what is gone are not."""
    Path("c.toml").touch()
    given = sets(damaged.settings() | QUICK | {"whatif.rules": ["positive_only"]})
    final = Path("runs/probe" if verb == "run" else "runs/probe.whatif.json")
    before_end = unchanged.require_unchanged
    module = f"funcprobe.adapters.{verb}.require_unchanged"

    def ending_with(act: Callable[[], object]) -> Any:
        def acting(*args: Any) -> None:
            act()
            before_end(*args)

        monkeypatch.setattr(module, acting)
        return command(verb, "c.toml", *given)

    outcome = ending_with(lambda: rewritten(damaged.adapter / "adapter_model.safetensors", b" "))
    assert outcome.status == 2
    assert "changed during the run, whose results would be of neither version" in outcome.err
    assert not final.exists()
    state = damaged.adapter / "optimizer.pt"

    def harmless() -> None:
        rewritten(state)  # the same content
        os.link(state, state.with_name("hard-link"))
        (damaged.adapter / "train.log").write_text("step 1")
        (damaged.adapter / "later.json").write_text("{}")

    damaged.adapter.joinpath("adapter_model.safetensors").write_bytes(
        (damaged.adapter / "adapter_model.safetensors").read_bytes()[:-1]
    )
    outcome = ending_with(harmless)
    assert outcome.status == 0, outcome.err
    assert "warning" not in outcome.err.splitlines()[-1]
    outcome = ending_with(lambda: shutil.rmtree(damaged.adapter))
    assert outcome.status == 0, outcome.err
    assert "was deleted during the run, after it had been read" in outcome.err
    assert final.exists()


def test_what_is_watched(tmp_path) -> None:
    """A checkpoint's files, its shards; not logs, nor checkpoints below an output folder."""
    names = ("config.json", "a.safetensors", "pytorch_model_fsdp_0/__0_0.distcp", "x/.metadata")
    others = ("train.log", "README.md", "checkpoint-2/config.json", ".git/a.json", "a/b/c/d/e.json")
    for name in (*names, *others):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sorted(unchanged._within(tmp_path)) == sorted(tmp_path / name for name in names)
