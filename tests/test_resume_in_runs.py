"""Whole runs that are interrupted again and again end as undisturbed ones, file by file."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from funcprobe.adapters import resume
from funcprobe.adapters import run as run_module
from support.checkpoints import sets

pytestmark = pytest.mark.usefixtures("offline")

GIVEN: dict[str, Any] = {
    "run.max_tokens": 24,
    "sampling.generation_batch": 4,
    "measure.etas": [1e-5, 30.0],  # the second is resampled
    "measure.next_lr": False,
    "measure.resample": True,
    "measure.second_order": "exact",
    "measure.observables": ["length", "kl_base"],
    "attribution.influence": 2,
}


class Work:
    """Microbatches and batches of responses that are kept, and an interrupt after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.left = 0, math.inf
        keep = resume._Pass.keep

        def counted(own: Any, *given: Any) -> None:
            keep(own, *given)
            self.done, self.left = self.done + 1, self.left - 1
            if self.left == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(resume._Pass, "keep", counted)
        monkeypatch.setattr(resume, "EVERY", 0.0)
        monkeypatch.setattr(resume, "SHARE", math.inf)
        monkeypatch.setattr(run_module, "_foretell", lambda *_, **__: None)  # what it tries is no work


def contents(run: Path) -> dict[str, Any]:
    """Of every file of numbers, without what a run costs."""
    results = json.loads((run / "results.json").read_text())
    del results["cost"]
    found: dict[str, Any] = {"results.json": results}
    for path in run.rglob("*.parquet"):
        found[path.name] = pq.read_table(path).to_pydict()
    for path in run.rglob("*.safetensors"):
        found[path.name] = {n: t.view(torch.uint8).tolist() for n, t in load_file(path).items()}
    return found


def test_a_run_that_is_interrupted_again_and_again(command, checkpoint, monkeypatch) -> None:
    Path("c.toml").touch()
    work = Work(monkeypatch)
    given = checkpoint.settings() | GIVEN

    def attempt(folder: str) -> Any:
        return command("run", "c.toml", *sets(given | {"run.folder": folder}))

    assert attempt("whole").status == 0
    whole, work.done = work.done, 0
    assert whole > 60
    attempts, said = 0, list[str]()
    while True:
        work.left = 17 if attempts else 2
        outcome = attempt("runs")
        attempts += 1
        said += [line for line in outcome.err.splitlines() if "from an interrupted run" in line]
        if outcome.status == 0:
            break
        assert outcome.status == 130
        assert attempts < 40
    assert attempts == (whole - 2) // 17 + 2 > 6
    assert work.done == whole  # each once
    assert {line.split(":")[0] for line in said} >= {"sample E", "first order"}
    assert not list(Path("runs/.stages").glob(f"*.{resume.SUFFIX}"))
    expected, found = contents(Path("whole/probe")), contents(Path("runs/probe"))
    assert len(expected) > 5
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name


@pytest.mark.slow
def test_other_etas_and_prompts_compute_what_is_new(command, checkpoint, monkeypatch) -> None:
    Path("c.toml").touch()
    work = Work(monkeypatch)
    given = checkpoint.settings() | GIVEN | {"measure.resample": False}

    def computed(**changes: Any) -> int:
        work.done = 0
        changed = given | {key.replace("__", "."): value for key, value in changes.items()}
        assert command("run", "c.toml", *sets(changed)).status == 0
        return work.done

    computed()
    assert computed() == 0
    forward = computed(measure__observables=["length"], measure__etas=[1e-5, 30.0, 1e-4])
    assert 0 < forward < 20
    # KL at one more eta: as many microbatches, with two forwards each.
    assert computed(measure__etas=[1e-5, 30.0, 1e-4]) == forward
    assert computed(measure__etas=[1e-4]) == 0
    # Two at once are those of a run that begins with them.
    two = {"measure__etas": [1e-5, 2e-4, 3e-3]}
    assert computed(**two) > 0
    apart = contents(Path("runs/probe"))
    computed(run__folder="other", **two)
    assert contents(Path("other/probe")) == apart
    # Another prompt: its own gradient, and tangents over E.
    assert forward < computed(attribution__influence=3) < 3 * forward
    assert computed(attribution__influence=1) == 0
