"""Real processes add in rank order, have the first one's answers, and see that they disagree."""

from pathlib import Path

import torch

from funcprobe.adapters.machine import launcher
from funcprobe.adapters.machine.ranks import World
from funcprobe.ranks import ALONE
from support.rank_processes import start_ranks

SIZE = 3


def test_sums_and_answers(tmp_path):
    program = str(Path(__file__).with_name("ranks_program.py"))
    for process in start_ranks(SIZE, [program, str(tmp_path)], tmp_path):
        process.wait(120)
    assert not "".join((tmp_path / f"rank-{r}.err").read_text() for r in range(SIZE))
    found = [torch.load(tmp_path / f"{r}.pt") for r in range(SIZE)]
    parts = zip(*(one["own"] for one in found), strict=True)
    expected = [(a + b) + c for a, b, c in parts]  # in rank order
    assert not torch.equal(expected[0], found[0]["own"][0])
    for one in found:
        for sums in (one["sums"], one["again"]):
            assert [x.dtype for x in sums] == [x.dtype for x in expected]
            assert all(torch.equal(a, b) for a, b in zip(sums, expected, strict=True))
        assert one["first"] == "of rank 0"
        assert one["gathered"] == [0, 1, 2]
        assert one["error"] == "InputError: bad rewards"
        assert one["different"].startswith("InputError: ranks 0 and 2 have different prompts:")
        assert one["equal"] is None
        assert one["elsewhere"].startswith("RuntimeError: ranks are at different points")
        assert "[3, 4, 5]" in one["elsewhere"]


def test_one_process_needs_no_launcher(monkeypatch):
    world = World()
    assert world.first
    assert world.ranks() is ALONE
    assert world.on_first(lambda: 3) == 3
    assert world.gathered("x") == ["x"]
    world.require_same({"files": 1})
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not launcher.launched()
    assert (launcher.local_rank(), launcher.local_size()) == (None, 1)
    for name, value in zip(launcher.VARIABLES, ("1", "2", "localhost", "1234"), strict=True):
        monkeypatch.setenv(name, value)
    assert launcher.launched()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (launcher.local_rank(), launcher.local_size()) == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")  # a launcher of one process
    assert not launcher.launched()
