"""An interrupted stage goes on from the files of its progress; none is left of one that is done."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from funcprobe.adapters import resume
from funcprobe.adapters.machine.cost import Cost, Stage
from funcprobe.adapters.machine.ranks import World
from funcprobe.adapters.resume import SUFFIX, computed
from funcprobe.adapters.store import Stages


class StoppedError(Exception):
    pass


@pytest.fixture
def eager(monkeypatch) -> None:
    """Every microbatch is written."""
    monkeypatch.setattr(resume, "EVERY", 0.0)
    monkeypatch.setattr(resume, "SHARE", math.inf)


def summed(steps: int, stop: int | None, made: list[int], plan: int = 0, passes: int = 2) -> Any:
    """A stage of some passes, each a sum of numbers; it stops at the number `stop`."""

    def compute(stage: Stage) -> list[torch.Tensor]:
        totals = []
        for number in range(passes):
            kept = stage.progress.begin((plan, steps), lambda _: True)
            done, total = 0, torch.zeros((), dtype=torch.float64)
            if kept.so_far is not None:
                (done,), (total,) = kept.so_far
            for i in range(done, steps):
                if len(made) == stop:
                    raise StoppedError
                made.append(steps * number + i)
                total = total + 1 / (3 + steps * number + i)
                stage.advance(2)
                kept.keep((i + 1,), lambda total=total: [total])
            totals.append(total)
        return totals

    return compute


def stage_of(said: list[str], advanced: list[int] | None = None) -> Stage:
    advance = (lambda _: None) if advanced is None else advanced.append
    return Stage(Cost("sums"), advance, 12, said.append)


def run(stages: Stages, made: list[int], stop: int | None = None, **changes: Any) -> tuple:
    said: list[str] = []
    advanced: list[int] = []
    like = [torch.zeros(0)] * 2
    compute, stage = summed(3, stop, made, **changes), stage_of(said, advanced)
    if stop is not None:
        with pytest.raises(StoppedError):
            computed(stages, "sums", {"of": 3}, like, compute, stage)
        return None, said, advanced
    return computed(stages, "sums", {"of": 3}, like, compute, stage), said, advanced


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("stop", range(1, 6))
def test_it_goes_on_where_it_stopped(tmp_path, stop) -> None:
    expected, *_ = run(Stages(tmp_path / "whole"), [])
    stages = Stages(tmp_path / "s")
    first: list[int] = []
    run(stages, first, stop)
    second: list[int] = []
    found, said, advanced = run(stages, second)
    assert first + second == list(range(6))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert said == [f"sums: {stop} microbatches ({2 * stop} of 12 sequences) from an interrupted run"]
    assert sum(advanced) == 12
    (left,) = files(tmp_path / "s")
    assert re.fullmatch(r"sums-[0-9a-f]{20}\.safetensors", left)
    assert files(tmp_path / "whole") == [left]


@pytest.mark.usefixtures("eager")
def test_a_file_that_is_damaged_in_any_byte_or_cut_is_discarded(tmp_path) -> None:
    expected, *_ = run(Stages(None), [])
    run(Stages(tmp_path / "one"), [], 5)
    names = files(tmp_path / "one")
    assert [name.split(".", 1)[1] for name in names] == [f"000.{SUFFIX}", f"001.{SUFFIX}"]
    whole = (tmp_path / "one" / names[1]).read_bytes()
    spoiled = [whole[:k] for k in (0, 7, 40, len(whole) - 1)]
    spoiled += [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in range(0, len(whole), 29)]
    without = 0
    for number, content in enumerate(spoiled):
        stages = Stages(tmp_path / f"s{number}")
        run(stages, [], 5)
        (tmp_path / f"s{number}" / names[1]).write_bytes(content)
        made: list[int] = []
        found, said, _ = run(stages, made)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert made in ([3, 4, 5], [5])  # 5 alone: a byte of the header's padding
        if made == [3, 4, 5]:
            without += 1
            assert ", of an interrupted run, is discarded: " in said[0]
        assert not [name for name in files(tmp_path / f"s{number}") if name.endswith(SUFFIX)]
    assert without > len(spoiled) - 4


@pytest.mark.usefixtures("eager")
def test_another_plan_and_fresh_do_not_take_it(tmp_path) -> None:
    """Nor the passes after it, which are of its results."""
    stages = Stages(tmp_path)
    run(stages, [], 5)
    first = tmp_path / files(tmp_path)[0]
    made: list[int] = []
    _, said, _ = run(stages, made, 5, plan=1)
    assert made == list(range(5))
    why = "is discarded: it is of another plan"
    assert said == [f"{first}, of an interrupted run, {why}"]
    made = []
    _, said, _ = run(stages._replace(fresh=True), made, plan=1)
    assert (made, said) == (list(range(6)), [])
    assert not [name for name in files(tmp_path) if name.endswith(SUFFIX)]


@pytest.mark.usefixtures("eager")
def test_what_is_left_of_a_stage_that_was_stored_is_deleted(tmp_path) -> None:
    """Killed between the two; and other stages' is left alone."""
    stages = Stages(tmp_path)
    run(stages, [], 5)
    left = {path: path.read_bytes() for path in tmp_path.glob(f"*.{SUFFIX}")}
    run(stages, [])
    for path, content in left.items():
        path.write_bytes(content)
    other = tmp_path / f"sums-{'0' * 20}.000.{SUFFIX}"
    other.touch()
    made: list[int] = []
    run(stages, made)
    assert made == []
    assert [path.name for path in tmp_path.glob(f"*.{SUFFIX}")] == [other.name]


def test_writes_are_rare_and_what_cannot_be_written_is_said_once(tmp_path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    written: list[str] = []
    cost = 0.02

    def save(tensors: Any, path: Path, metadata: Any = None) -> None:
        now[0] += cost
        written.append(path.name)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(resume, "save_file", save)

    def slow(step: float) -> Any:
        def compute(stage: Stage) -> list[torch.Tensor]:
            kept = stage.progress.begin((1,), lambda _: True)
            for i in range(100):
                now[0] += step
                kept.keep((i,), lambda: [torch.zeros(1)])
            return [torch.zeros(1)]

        return compute

    def writes(step: float) -> int:
        written.clear()
        stage = stage_of([])
        computed(Stages(tmp_path), f"of-{step}-{cost}", 0, [torch.zeros(0)], slow(step), stage)
        return len(written)

    assert writes(0.001) == 0  # within a second
    assert writes(0.1) == 9
    assert writes(5.0) == 100  # each microbatch
    cost = 1.0
    assert writes(0.1) == 1  # a write of a second once in twenty
    assert writes(5.0) == 25
    monkeypatch.setattr(resume, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    said: list[str] = []
    computed(Stages(tmp_path), "full", 0, [torch.zeros(0)], slow(5.0), stage_of(said))
    assert said == ["warning: the progress of this stage is not kept: [Errno 28] full"]


class TwoRanks(World):
    """Of the second process, which nobody waits for here."""

    def gathered(self, value: Any) -> list[Any]:
        return [value] * 2

    def on_first(self, compute: Any) -> Any:
        return compute()


@pytest.mark.usefixtures("eager")
def test_each_process_has_its_own(tmp_path) -> None:
    ranks = [Stages(tmp_path, world=TwoRanks(rank, 2)) for rank in (0, 1)]
    for stages, stop in zip(ranks, (1, 2), strict=True):
        run(stages, [], stop)
    assert [name.split(".")[1] for name in files(tmp_path)] == ["0of2", "1of2"]
    made: list[int] = []
    run(ranks[1], made)
    assert made == list(range(2, 6))
    assert [name.split(".")[1] for name in files(tmp_path)] == ["0of2"]
    run(ranks[0], made)
    assert files(tmp_path)[0].endswith(".safetensors")
    assert len(load_file(tmp_path / files(tmp_path)[0])) == 2
