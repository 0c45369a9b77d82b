"""The README: short, its tree is the repository's, its notebook block runs as it stands."""

import itertools
import re
from pathlib import Path

import pytest

from funcprobe.adapters.checkpoint import toy as toy_module
from funcprobe.adapters.checkpoint.toy import Recipe
from funcprobe.adapters.results import load
from support.checkpoints import sets
from support.paths import ROOT

README = ROOT / "README.md"


TINY = Recipe(seed=3, hidden=32, layers=2, supervised_steps=6, policy_steps=2)


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
        assert named == there - {"__init__.py", "__main__.py"}


def test_the_first_page_is_short():
    """A researcher has five minutes; a block of code is read, not scrolled through."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 220
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 20


@pytest.mark.slow
def test_the_notebook_block_gives_the_quickstarts_numbers(command, tmp_path, monkeypatch, capsys):
    """The block as printed, after a quickstart of a smaller toy and of fewer sequences."""
    toy = toy_module.ensure_toy(tmp_path / "toy", recipe=TINY)
    monkeypatch.setattr(toy_module, "ensure_toy", lambda *_, **__: toy)
    given = {
        "policy.checkpoint": str(toy.checkpoint),
        "prompts.source": str(toy.prompts),
        "reward.function": write_reward(tmp_path),
        "sampling.B_E": 24,
        "sampling.B_U": 4,
        "sampling.G": 3,
        "run.device": "cpu",
    }
    outcome = command("run", ROOT / "configs" / "quickstart.toml", *sets(given))
    assert outcome.status == 0, outcome.err
    results = load("runs/quickstart")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    capsys.readouterr()
    exec(code, {})
    first, measured = (line.split() for line in capsys.readouterr().out.splitlines())
    # Microbatches of other sizes sum in another order.
    assert float(first[0]) == pytest.approx(results.first_order.derivative.value, rel=1e-9)
    assert float(first[1]) == pytest.approx(results.first_order.se_total.value, rel=1e-9)
    (row,) = [row for row in results.sweep if row.eta == 1e-5]
    assert float(measured[0]) == pytest.approx(row.measured.value, rel=1e-6, abs=0)


def write_reward(folder: Path) -> str:
    """A reward that differs within groups, whatever the policy has learnt."""
    path = folder / "length.py"
    path.write_text("def length(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    return f"{path}:length"
