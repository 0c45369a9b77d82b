"""A user's terminal shows our own lines and nothing that a library says beside them."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.architectures import ARCHITECTURES, lora_config, save_adapter, save_base
from support.checkpoints import Checkpoint, sets
from support.commands import Outcome, children

# With our own voice taken away, nothing is left.
SILENCED = """
import io
import typer
from rich.console import Console
from funcprobe.adapters.commands import preparing, probing
from funcprobe.adapters.console import Narrator

Narrator._print = lambda self, line: None
preparing.stdout = probing.stdout = lambda: Console(file=io.StringIO(), width=120)
typer.echo = lambda *_, **__: None
"""

# As on a machine where bitsandbytes is not installed: its finder does not find it.
WITHOUT_BITSANDBYTES = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def find_all_but_one(name, path=None, target=None):
    return None if name.split(".")[0] == "bitsandbytes" else find_spec(name, path, target)


PathFinder.find_spec = staticmethod(find_all_but_one)
"""

LOUD = """
import sys, warnings

def loud(completions, **_):
    print("a line of a library's")
    warnings.warn("and a warning")
    return [float(len(text)) for text in completions]
"""


def run(settings: dict[str, Any], **changes: Any) -> list[str]:
    return ["run", "c.toml", *sets(settings | {k.replace("__", "."): v for k, v in changes.items()})]


@pytest.mark.slow
def test_import_says_nothing() -> None:
    script = "import funcprobe, funcprobe.adapters.trainers"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_filters_drop_one_line_and_let_others_through() -> None:
    """On any processor: bitsandbytes warns of its missing kernel only where AVX512-BF16 is there."""
    import funcprobe.adapters  # noqa: F401

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def passes(text: str) -> bool:
        record = logging.LogRecord(logger.name, logging.WARNING, "", 0, text, (), None)
        return bool(logger.filter(record))

    assert not passes("Failed to load CPU gemm_4bit_forward from kernels-community: no module")
    assert passes("4-bit weights are damaged")


def ended(
    names: list[str], checkpoint: Checkpoint, folder: Path, python_path: Path | None = None
) -> dict[str, Outcome]:
    """How each command ended that is named, with imports and the end of its process."""
    (folder / "c.toml").touch()
    (folder / "loud.py").write_text(LOUD)
    settings = checkpoint.settings()
    in_4_bit = settings | {"policy.dtype": "float32", "policy.mode": "qlora"}
    commands = {
        "init": ["init", "new.toml"],
        "inspect": ["inspect", str(checkpoint.adapter)],
        "check": ["check", "c.toml", *sets(settings)],
        "run": run(settings, run__name="one"),
        "qlora": run(in_4_bit, run__name="two"),
        "loud": run(settings, run__name="three", reward__function=f"{folder}/loud.py:loud"),
    }
    given = [commands[name] for name in names]
    found = children(given, cwd=folder, prepared=SILENCED, python_path=python_path)
    return dict(zip(names, found, strict=True))


@pytest.mark.slow
def test_commands_say_nothing_but_what_is_ours(checkpoint, tmp_path) -> None:
    """A run in 4 bits is a run, too, and has bitsandbytes at work."""
    found = ended(["init", "inspect", "check", "qlora"], checkpoint, tmp_path)
    assert found == dict.fromkeys(found, Outcome(0, "", ""))
    assert (tmp_path / "new.toml").is_file()
    assert json.loads((tmp_path / "runs/two/results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False], ids=["bitsandbytes", "without"])
def test_every_command_with_and_without_bitsandbytes(installed, checkpoint, tmp_path) -> None:
    path = None if installed else tmp_path / "path"
    if path is not None:
        path.mkdir()
        (path / "sitecustomize.py").write_text(WITHOUT_BITSANDBYTES)
    names = ["init", "inspect", "check", "run", "qlora", "loud"]
    found = ended(names, checkpoint, tmp_path, path)
    loud = found.pop("loud")
    assert "a line of a library's" in loud.out
    assert "UserWarning: and a warning" in loud.err
    assert found.pop("qlora") == Outcome(0 if installed else 2, "", "")
    assert found == dict.fromkeys(found, Outcome(0, "", ""))


NOISY = [
    ("gpt2", "lora-bias", False),  # its forward asks for masks, peft for biases of the base
    ("llama", "lora-embedding", True),  # peft advises on merging, and on saving
]


@pytest.mark.slow
def test_adapters_that_peft_advises_on(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "c.toml").touch()
    commands = []
    for architecture, adapter, tied in NOISY:
        base_folder = save_base(architecture, tmp_path / f"{architecture}-base", tied=tied)
        base = type(ARCHITECTURES[architecture]()).from_pretrained(base_folder)
        folder = tmp_path / architecture
        save_adapter(base, lora_config(architecture, adapter), base_folder, folder)
        given = {"policy.checkpoint": str(folder), "optimizer.rule": "sgd", "run.name": architecture}
        commands.append(run(checkpoint.settings() | given))
    found = children(commands, cwd=tmp_path, prepared=SILENCED)
    assert found == [Outcome(0, "", "")] * len(NOISY)
