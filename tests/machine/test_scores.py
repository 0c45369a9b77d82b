"""How much of a GPU's memory a chunk of scores may take."""

import pytest
import torch

import funcprobe
from funcprobe.adapters.machine import memory, precision
from funcprobe.policy import readout
from support.policies import tiny_policy

GIB = 2**30


def test_a_share_of_the_device_within_bounds() -> None:
    shares = [memory._share_for_scores(gib * GIB) for gib in (8, 80, 1024)]
    assert shares == [readout.BYTES, 80 * GIB // 64, 4 * GIB]
    assert memory.room_for_scores(torch.device("cpu")) is None


@pytest.mark.parametrize("room", [None, 1])
def test_chunks_of_a_forward_are_sized_by_it(monkeypatch, room) -> None:
    """On the CPU as ever; else in tokens as many times more as there is room, where V is small."""
    forward = funcprobe.bind(tiny_policy()).forward
    monkeypatch.setattr(precision, "room_for_scores", lambda _: room and room * GIB)
    found = precision.of_machine(forward, None)
    assert found.readout is not None
    expected = readout.MOST if room is None else readout.MOST * GIB // readout.BYTES
    assert readout.tokens_of_chunk(found.readout, 3) == expected
