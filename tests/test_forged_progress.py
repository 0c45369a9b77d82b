"""Files of an interrupted run with a right checksum and other contents: computed from the beginning."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_resume_in_runs import GIVEN, Work, contents

from funcprobe.adapters import resume
from funcprobe.adapters.store.sealed import ENTRY
from support.checkpoints import sets

pytestmark = pytest.mark.usefixtures("offline")

Tensors = list[torch.Tensor]


def _other(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """Of the results, not of the counts."""
    return lambda found: [found[0], *(change(x) for x in found[1:])]


def _not_finite(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() else x - x.max() - 1


FORGED: dict[str, Callable[[Tensors], Tensors]] = {
    "longer": _other(lambda x: torch.cat([x, x])),
    "another dtype": _other(lambda x: x.to(torch.float16)),
    "not finite": _other(_not_finite),
    "one tensor less": lambda found: found[:-1],
    "many microbatches": lambda found: [found[0] + 1000, *found[1:]],
    "memory that ran out": lambda found: [torch.cat([found[0], torch.tensor([900])]), *found[1:]],
    "no counts": lambda found: [found[0][:2], *found[1:]],
    "other names": list,
}


def forge(path: Path, change: Callable[[Tensors], Tensors], name: str = "{:06d}") -> None:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[ENTRY])
        found = [file.get_tensor(key) for key in sorted(file.keys())]
    whole = [x.contiguous() for x in change(found)]
    named = {name.format(i): x.clone() for i, x in enumerate(whole)}
    about["crc32"] = resume._checksum(whole)
    save_file(named, path, {ENTRY: json.dumps(about, sort_keys=True)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("done", "ways"),
    [
        (2, ("longer", "another dtype", "not finite", "many microbatches", "no counts")),
        (20, ("longer", "not finite", "one tensor less", "memory that ran out", "other names")),
    ],
)
def test_forged_progress(command, checkpoint, monkeypatch, done, ways) -> None:
    """Of a sampling and of the first order; passes/test_resume.py has every pass."""
    Path("c.toml").touch()
    work = Work(monkeypatch)
    given = checkpoint.settings() | GIVEN

    def attempt(folder: str) -> Any:
        return command("run", "c.toml", *sets(given | {"run.folder": folder}))

    work.left = done
    assert attempt("runs").status == 130
    (*_, path) = sorted(Path("runs/.stages").glob(f"*.{resume.SUFFIX}"))
    shutil.copytree("runs", "kept")
    assert attempt("runs").status == 0
    expected = contents(Path("runs/probe"))
    for how in ways:
        shutil.rmtree("runs")
        shutil.copytree("kept", "runs")
        forge(path, FORGED[how], "x{:06d}" if how == "other names" else "{:06d}")
        outcome = attempt("runs")
        assert outcome.status == 0, (path.name, how, outcome.err)
        assert f"{path}, of an interrupted run, is discarded: " in " ".join(outcome.err.split()), how
        assert contents(Path("runs/probe")) == expected, (path.name, how)
        assert not list(Path("runs/.stages").glob(f"*.{resume.SUFFIX}"))
