"""ProbeCallback in a training of two processes: all of them compute, none is left waiting."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.probe_processes import FAILS, HANGS
from support.trainers import require_same
from support.two_processes import run_on_two

pytestmark = pytest.mark.slow  # two processes that import everything

STEPS = 3


@pytest.fixture(scope="module")
def of_rank(checkpoint, tmp_path_factory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("two")
    torch.save(tuple(checkpoint), folder / "checkpoint.pt")
    run_on_two("support.probe_processes", folder)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def test_the_probe_of_both_is_that_of_one(of_rank) -> None:
    """The same weights, gradients and seed: in float64 to 1e-12, with half of the tokens each."""
    for step in range(STEPS):
        parts = [rank["seen"][step] for rank in of_rank]
        assert [part["size"] for part in parts] == [2, 2]
        assert parts[0]["numbers"] == parts[1]["numbers"]
        shared, alone = parts[0]["numbers"]
        assert shared.keys() == alone.keys()
        assert alone["measured"] != 0
        for key, value in alone.items():
            assert shared[key] == pytest.approx(value, rel=1e-12, abs=1e-15), key
        whole = {part["tokens"][1] for part in parts}
        assert len(whole) == 1
        assert sum(part["tokens"][0] for part in parts) < 1.3 * min(whole)
        assert max(part["tokens"][0] for part in parts) < 0.75 * min(whole)


def test_training_goes_on_bit_by_bit_in_both(of_rank) -> None:
    for rank, found in enumerate(of_rank):
        require_same(found["off"], found["on"])
        require_same(found["off"], found["failing"])
        require_same(found["off"], found["hanging"])
        assert [e["step"] for e in found["on"].probed] == ([] if rank else [1, 2, 3])


def test_one_that_fails_is_one_warning_and_no_hang(of_rank) -> None:
    first, second = of_rank
    assert second["said by failing"] == []
    said = dict(zip(FAILS, first["said by failing"], strict=True))
    assert said[2] == "funcprobe: step 2 is not probed: process 1 of 2: no numbers here"
    assert said[3] == "funcprobe: step 3 is not probed: out of memory"
    skipped = [e.get("funcprobe/skipped") for e in first["failing"].probed]
    assert skipped == [None, 1, 1]
    assert first["failing"].probed[0] == first["on"].probed[0]


def test_one_that_hangs_is_one_warning_and_the_next_step_is_probed(of_rank) -> None:
    """The other waits no longer than its patience, and the group of the next probe is a new one."""
    first, second = of_rank
    assert second["said by hanging"] == []
    (said,) = first["said by hanging"]
    assert said.startswith(f"funcprobe: step {HANGS} is not probed: ")
    probed = first["hanging"].probed
    assert [e.get("funcprobe/skipped") for e in probed] == [None, 1, None]
    assert [probed[i] for i in (0, 2)] == [first["on"].probed[i] for i in (0, 2)]
