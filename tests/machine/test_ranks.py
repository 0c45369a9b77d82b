"""Real processes add in rank order, have the first one's answers, and see that they disagree."""

import socket
from pathlib import Path

import pytest
import torch

from funcprobe.adapters.machine import launcher, ranks, watch
from funcprobe.adapters.machine.ranks import World
from funcprobe.ranks import ALONE
from support.rank_processes import free_port, start_ranks

SIZE = 3


def test_sums_and_answers(tmp_path):
    program = str(Path(__file__).with_name("ranks_program.py"))
    for process in start_ranks(SIZE, [program, str(tmp_path)], tmp_path):
        process.wait(120)
    said = "".join((tmp_path / f"rank-{r}.err").read_text() for r in range(SIZE))
    assert "Traceback" not in said  # torch may warn of a connection that another rank has closed
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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launch_of_which_the_others_do_not_come_is_a_line(monkeypatch, capsys, rank):
    """As where a training's variables are inherited by a command that is started alone."""
    values = (str(rank), "2", "127.0.0.1", str(free_port()))
    for name, value in zip(launcher.VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "JOINING", 1)
    with pytest.raises(SystemExit) as ended:
        ranks.join(lambda _: pytest.fail("no others are there"))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"funcprobe: rank {rank} of 2 does not find the others (")
    assert "unset RANK and WORLD_SIZE" in line


def test_bytes_of_a_stranger_are_a_line_like_another():
    """A scan of ports sends whatever it likes, which must not end a run."""
    here, stranger = socket.socketpair()
    stranger.sendall(b"\x16\x03\xff\xfe\n")
    stranger.close()
    with here:
        (line,) = watch._lines(here)
    assert line.isascii()
