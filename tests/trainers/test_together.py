"""What processes of a training do together: all of it, or none; here as threads.

test_probe_of_two_processes.py has a training of two processes.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from funcprobe import InputError
from funcprobe.adapters.trainers import together as module
from funcprobe.adapters.trainers.together import OtherProcessError, Together


class Meeting:
    """An exchange in which no value is taken before all are there."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = threading.Barrier(size, timeout=10), [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.barrier.wait()
        self.values[rank] = value
        self.barrier.wait()
        return list(self.values)


def outcomes(work: Callable[[Together], Any], size: int = 3) -> list[Any]:
    """What `work` returns, or raises, in each of so many threads."""
    meeting, found = Meeting(size), [None] * size

    class Thread(Together):
        def _exchanged(self, value: Any) -> list[Any]:
            return meeting.exchange(self.rank, value)

    def run(rank: int) -> None:
        own = Thread()
        own.rank, own.size = rank, size
        try:
            with own:
                found[rank] = work(own)
        except (ValueError, RuntimeError) as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert not meeting.barrier.broken
    return found


def test_each_has_the_values_of_all() -> None:
    assert outcomes(lambda own: own.gathered(own.rank**2)) == [[0, 1, 4]] * 3


@pytest.mark.parametrize("when", ["at once", "between", "at the end"])
def test_one_that_fails_ends_it_for_all(when) -> None:
    def work(own: Together) -> str:
        for moment in ("at once", "between", "at the end"):
            if own.rank == 1 and moment == when:
                raise InputError("not\nfinite")
            if moment != "at the end":
                own.gathered(moment)
        return "done"

    first, own, last = outcomes(work)
    assert isinstance(own, InputError)
    for other in (first, last):
        assert type(other) is OtherProcessError
        assert str(other) == "process 1 of 3: not finite"


def test_of_two_that_fail_each_has_its_own_reason() -> None:
    def work(own: Together) -> None:
        if own.rank != 1:
            raise ValueError(str(own.rank))
        own.gathered(None)

    first, middle, last = map(str, outcomes(work))
    assert (first, middle, last) == ("0", "process 0 of 3: 0", "2")


def test_alone_nothing_is_asked_of_torch(monkeypatch) -> None:
    monkeypatch.setattr(module.distributed, "new_group", None)
    with module.together() as own:
        tensor = torch.ones(2)
        assert torch.equal(own.ranks.add([tensor])[0], tensor)
        assert own.gathered("x") == ["x"]
    with pytest.raises(KeyError), own:
        raise KeyError
