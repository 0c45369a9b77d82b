"""The README's notebook section runs as it stands."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import funcprobe
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.statistics import intervals
from support.paths import ROOT, TESTS
from support.policies import random_batch

README = ROOT / "README.md"


def rows(batch: funcprobe.Batch) -> tuple[list, list, list]:
    """A batch taken apart again."""
    parts = []
    for tokens, x, y in zip(*batch[:3], strict=True):
        parts.append((tokens[:x].tolist(), tokens[x : x + y].tolist()))
    return [p for p, _ in parts], [r for _, r in parts], batch.prompt_N.tolist()


def test_the_tree_is_the_repository():
    """Every folder and file at the top of the two rooms stands in the tree, and nothing else does."""
    text = README.read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(funcprobe/ .*?)^```", text, re.DOTALL | re.MULTILINE)
    for room in ("funcprobe", "adapters"):
        lines = block[block.index(f"{room}/ ") :].splitlines()[1:]
        indented = itertools.takewhile(lambda line: line.startswith("  "), lines)
        named = {name for line in indented for name in re.findall(r"\b\w+(?:/|\.py\b)", line[:30])}
        there = {
            path.name + ("/" if path.is_dir() else "")
            for path in (README.parent / room).iterdir()
            if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
        }
        assert named == there - {"__init__.py"}


def test_every_test_that_is_named_is_there():
    """In the README and in docs/: `test_x.py::test_y` of whatever folder, or a path from the root."""
    pages = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named) >= 15
    for file, test in named:
        (path,) = TESTS.rglob(file)
        assert re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE), (
            file,
            test,
        )
    for path in re.findall(r"`(tests/[\w/]+\.py)", text):
        assert (ROOT / path).is_file(), path


def test_the_notebook_section_runs(checkpoint, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("checkpoint-500", str(checkpoint.adapter))
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base, dtype=torch.float64)
    E = rows(random_batch([(i % 5, 1 + i % 5, 1 + i % 4) for i in range(8)], vocabulary=14))
    U = rows(random_batch([(i // 2, 1 + i // 2, 1 + i % 3) for i in range(6)], vocabulary=14))
    names = {
        "Path": Path,
        **{name: getattr(intervals, name) for name in ("delta_error", "sum_error", "student", "total")},
        "read_adam_state": read_adam_state,
        "peft_model": PeftModel.from_pretrained(base, checkpoint.adapter, is_trainable=True),
        "rewards": [1.0, 0.0, 0.5, 2.0, 0.0, 1.0],
    }
    for name, found in (("eval", E), ("update", U)):
        for key, value in zip(("prompt_ids", "response_ids", "prompt_index"), found, strict=True):
            names[f"{name}_{key}"] = value
    exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    derivative, measured, star = (float(printed[i].split()[0]) for i in (0, 1, 3))
    assert measured / (1e-5 * derivative) == pytest.approx(1, abs=0.05)  # what first order misses
    missed = measured - 1e-5 * derivative
    assert abs(missed / measured) == pytest.approx(1e-5 / star, rel=0.1)  # the quadratic term
    assert printed[2].startswith("Interval(low=")
    assert float((names["tangent"].logp_NR.sum(1) - names["s"]).abs().max()) < 1e-9
