"""A run that several processes share is the run of one; they end together."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from support.paths import ROOT
from support.rank_processes import start_ranks

SMALL = ("sampling.B_E=24", "sampling.B_U=5", "sampling.G=3", "run.report=false", "measure.etas=[1e-6]")
GONE = 30.0  # seconds in which all are to be gone


def arguments(folder: Path, *more: str) -> list[str]:
    sets = [word for key in (*SMALL, f"run.folder={folder}", *more) for word in ("--set", key)]
    return ["-m", "funcprobe", "run", str(ROOT / "configs" / "quickstart.toml"), *sets]


def run(size: int, folder: Path, *more: str) -> tuple[list[int], list[str], list[str]]:
    """(exit statuses, stdout, stderr) of every rank; one process without a launcher's variables."""
    folder.mkdir(parents=True, exist_ok=True)
    found = start_ranks(size, arguments(folder / "runs", *more), folder)
    statuses = [process.wait(300) for process in found]
    out, err = ([(folder / f"rank-{r}.{x}").read_text() for r in range(size)] for x in ("out", "err"))
    return statuses, out, err


def numbers(value, place=""):
    """Every number of results.json by its place, but what a run costs and what is rounding itself."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in {"cost", "rounding", "fit", "residual", "relative", "dropout"}:
                yield from numbers(one, f"{place}/{key}")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from numbers(one, f"{place}/{i}")
    elif isinstance(value, float):
        yield place, value


def require_same_run(one: Path, other: Path) -> None:
    for name in ("eval", "update"):
        a, b = (
            pd.read_parquet(x / "quickstart" / "rollouts" / f"{name}.parquet") for x in (one, other)
        )
        assert a["response_ids"].map(list).equals(b["response_ids"].map(list))
        assert len(a) > 10
    a, b = (load_file(x / "quickstart" / "direction.safetensors") for x in (one, other))
    for key, tensor in a.items():
        assert float((tensor - b[key]).abs().max()) <= 1e-12 * float(tensor.abs().max()), key
    a, b = (json.loads((x / "quickstart" / "results.json").read_text()) for x in (one, other))
    a, b = dict(numbers(a)), dict(numbers(b))
    assert a.keys() == b.keys()
    assert len(a) > 100
    scale = abs(a["/entropy/value"])

    def allowed(place):
        """Rounding; of second derivatives, by differences, and of degrees of freedom far more of it."""
        rough = "second_order" in place or "degrees_of_freedom" in place
        return (1e-5 if rough else 1e-9) * max(abs(a[place]), 1e-3 * scale)

    off = {k: (a[k], b[k]) for k in a if abs(a[k] - b[k]) > allowed(k)}
    assert not off


@pytest.mark.slow  # in processes of their own; in one: passes/test_ranks.py
def test_two_processes_and_one(tmp_path):
    """Rank 0 alone speaks and writes; what the passes cost is counted over both."""
    statuses, out, err = run(2, tmp_path / "two")
    assert statuses == [0, 0], err
    assert (out[1], err[1]) == ("", "")
    assert "The next step" in out[0]
    assert "wrote" in err[0]
    assert run(1, tmp_path / "one")[0] == [0]
    require_same_run(tmp_path / "one" / "runs", tmp_path / "two" / "runs")
    costs = [
        json.loads((tmp_path / x / "runs" / "quickstart" / "results.json").read_text())["cost"]["total"]
        for x in ("one", "two")
    ]
    assert costs[0]["passes"] == pytest.approx(costs[1]["passes"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_more_processes_and_again(tmp_path, size):
    for name in ("first", "second"):
        assert run(size, tmp_path / name)[0] == [0] * size
    assert run(1, tmp_path / "one")[0] == [0]
    require_same_run(tmp_path / "one" / "runs", tmp_path / "first" / "runs")
    first, second = (
        load_file(tmp_path / name / "runs" / "quickstart" / "direction.safetensors")
        for name in ("first", "second")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_an_error_is_one_line_of_all(tmp_path):
    """Of the configuration, on every rank; of a reward, on rank 0; of files, where ranks see others."""
    statuses, out, err = run(2, tmp_path / "key", "sampling.temperature=-1")
    assert statuses == [2, 2]
    assert "".join(out) == ""
    assert len("".join(err).splitlines()) == 1
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def none(completions, **_):\n    return [float('inf')] * len(completions)\n")
    statuses, _, err = run(2, tmp_path / "reward", f"reward.function={rewards}:none")
    assert statuses == [2, 2]
    lines = [x for x in "".join(err).splitlines() if x.startswith("funcprobe:")]
    assert len(lines) == 1
    assert "Traceback" not in "".join(err)
    assert not (tmp_path / "reward" / "runs" / "quickstart").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_process_ends_all(tmp_path, victim):
    processes = start_ranks(3, arguments(tmp_path / "runs", "sampling.B_E=2048"), tmp_path)
    end = time.monotonic() + 200
    while "sample E" not in (tmp_path / "rank-0.err").read_text() and time.monotonic() < end:
        time.sleep(0.2)
    processes[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    statuses = [p.wait(4 * GONE) for p in processes]
    assert time.monotonic() - start < GONE
    assert statuses.pop(victim) == -signal.SIGKILL
    assert statuses == [1, 1]
    said = "".join((tmp_path / f"rank-{r}.err").read_text() for r in range(3))
    assert said.count(f"funcprobe: rank {victim}") == 1
    assert "is gone" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs" / "quickstart").exists()
    assert all(x.name == ".stages" or x.suffix for x in (tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_goes_on_to_the_same_numbers(tmp_path):
    """A rank is killed while E is sampled, in the passes of first order, and in the measurement."""
    given = ("sampling.B_E=4096", "run.max_tokens=512")

    def started(name: str) -> tuple[list[subprocess.Popen], Path]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return start_ranks(2, arguments(folder / "runs", *given), folder), folder / "rank-0.err"

    processes, _ = started("whole")
    assert [p.wait(300) for p in processes] == [0, 0]
    said = list[str]()
    for victim, after in ((0, "passes over E"), (1, "gradient on U:"), (0, "attribution:")):
        processes, log = started("killed")
        end = time.monotonic() + 200
        while after not in log.read_text() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(2.5)  # progress is written once a second
        processes[victim].send_signal(signal.SIGKILL)
        statuses = [p.wait(4 * GONE) for p in processes]
        assert statuses[victim] == -signal.SIGKILL, "it had ended"
        said.append(log.read_text())
    processes, log = started("killed")
    assert [p.wait(300) for p in processes] == [0, 0]
    said.append(log.read_text())
    lines = [line for text in said for line in text.splitlines() if "from an interrupted run" in line]
    # The measurement is of short stages, each stored when it is done.
    assert {line.split(":")[0] for line in lines} >= {"sample E", "first order"}, said
    whole, killed = (tmp_path / name / "runs" / "quickstart" for name in ("whole", "killed"))
    a, b = (load_file(x / "direction.safetensors") for x in (whole, killed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (json.loads((x / "results.json").read_text()) | {"cost": None} for x in (whole, killed))
    assert a == b
    tables = sorted(x.relative_to(whole) for x in whole.rglob("*.parquet"))
    assert len(tables) > 2
    for table in tables:
        assert pd.read_parquet(whole / table).equals(pd.read_parquet(killed / table)), table


@pytest.mark.slow
def test_the_module_is_the_command_and_others_are_of_one_process(tmp_path):
    (process,) = start_ranks(1, ["-m", "funcprobe", "--version"], tmp_path)
    assert process.wait(60) == 0
    assert (tmp_path / "rank-0.out").read_text().startswith("funcprobe ")
    for process in start_ranks(2, ["-m", "funcprobe", "inspect", "toy"], tmp_path):
        assert process.wait(100) == 2
    said = "".join((tmp_path / f"rank-{r}.err").read_text() for r in range(2))
    assert said.startswith("funcprobe: funcprobe inspect is the work of one process")
    assert len(said.splitlines()) == 1
