"""Settings of the suite, and what its tests start from: policies, checkpoints, commands."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

import funcprobe
from funcprobe import tree
from support.browser import chromium, open_page  # noqa: F401 (fixtures)
from support.checkpoints import PIECES, Checkpoint, edit_json, make_checkpoint, sets
from support.commands import Outcome
from support.jets import BATCH, seconds
from support.policies import random_like, tiny_policy
from support.saved_runs import enlarged, run_of

# A busy machine is no failure. Where CI runs, the same examples every time.
settings.register_profile("funcprobe", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("funcprobe")

TESTS = Path(__file__).parent

# For tensors this small a second thread costs more than it gives, and on busy cores many times as
# much: the two wait for each other. OMP_NUM_THREADS=2 shows that no test depends on it.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests of -m device, as cuda")


# Folders and files of the core's own tests, by which coverage, of the core alone, is measured.
OF_THE_CORE = {
    *("attribution", "autodiff", "losses", "passes", "policy", "rules", "statistics", "step"),
    *("test_order_of_names.py", "test_probe.py", "test_sampler_checks.py", "test_tree.py"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tracing makes a test half as long again; what a run alone reaches has no test of its own.

    First the files of no folder: what is long, whole runs and processes, must not be left for the end.
    """
    items.sort(key=lambda item: len(item.path.relative_to(TESTS).parts))
    for item in items:
        if item.path.relative_to(TESTS).parts[0] not in OF_THE_CORE:
            item.add_marker("no_cover")


def pytest_collection_finish() -> None:
    """accelerate collects garbage after each training: half of a small one's time, if imports count."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def policy64():
    return tiny_policy()


@pytest.fixture(scope="session")
def probe64(policy64):
    return funcprobe.bind(policy64, max_tokens=64)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Checkpoint:
    """Not to be changed: `damaged` gives a copy."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def damaged(checkpoint, tmp_path) -> Checkpoint:
    """A copy to spoil; its base is a copy, too."""
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint.adapter.parent, folder)
    copy = Checkpoint(*(folder / path.name for path in checkpoint))
    edit_json(copy.adapter / "adapter_config.json", base_model_name_or_path=str(copy.base))
    return copy


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., Outcome]:
    """`funcprobe ARGUMENTS` in this process and in tmp_path; an exception other than SystemExit
    passes, as its traceback would reach the user."""
    from funcprobe.adapters import cli

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["funcprobe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        status = ended.value.code
        return Outcome(status if isinstance(status, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def ran(checkpoint, command) -> Callable[..., tuple[dict[str, Any], Outcome]]:
    """results.json of a run with changed settings, and what it printed; a__b=1 sets a.b."""

    def call(*flags: str, **changes: Any) -> tuple[dict[str, Any], Outcome]:
        given = checkpoint.settings() | {"run.name": "one", "measure.next_lr": False}
        given |= {key.replace("__", "."): value for key, value in changes.items()}
        Path("c.toml").touch()
        outcome = command("run", "c.toml", *sets(given), *flags)
        assert outcome.status == 0, outcome.err
        return json.loads(Path("runs/one/results.json").read_text()), outcome

    return call


@pytest.fixture
def probe(checkpoint, tmp_path, monkeypatch):
    """Runs with the fixture's settings and changes to them, in tmp_path; gives results.json."""
    from funcprobe.adapters import run
    from funcprobe.adapters.config.file import read_config
    from funcprobe.adapters.console import Narrator
    from funcprobe.adapters.results import load

    monkeypatch.chdir(tmp_path)

    def call(
        name: str, *, fresh: bool = False, of: Checkpoint = checkpoint, **changes: Any
    ) -> dict[str, Any]:
        given = of.settings() | {"run.name": name}
        given |= {key.replace("__", "."): value for key, value in changes.items()}
        Path("c.toml").touch()
        config = read_config(Path("c.toml"), sets(given)[1::2])
        results, folder = run.run(config, Narrator(), fresh=fresh)
        written: dict[str, Any] = json.loads((folder / "results.json").read_text())
        assert written == results.model_dump(mode="json")
        assert load(folder) == results
        return written

    return call


@pytest.fixture(scope="session")
def run_one(checkpoint, tmp_path_factory) -> Path:
    """The folder of one run; not to be changed."""
    from funcprobe.adapters import run
    from funcprobe.adapters.config.file import read_config
    from funcprobe.adapters.console import Narrator

    place = tmp_path_factory.mktemp("runs")
    (place / "c.toml").touch()
    given = {"run.folder": str(place), "run.name": "one", "measure.etas": [1e-6, 1e-4]}
    settings = sets(checkpoint.settings() | given)[1::2]
    return run.run(read_config(place / "c.toml", settings), Narrator())[1]


@pytest.fixture(scope="session")
def run_folder(checkpoint, tmp_path_factory) -> Path:
    """The folder of a run with shares of tokens, influences and rules; not to be changed."""
    return run_of(checkpoint, tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="session")
def saved_run(run_folder):
    from funcprobe.adapters.results.saved import load_run

    return load_run(run_folder)


@pytest.fixture(scope="session")
def large_run(run_folder, tmp_path_factory):
    """64 prompts of U with 8 responses of 300 tokens each, E as large; the numbers are made up."""
    from funcprobe.adapters.results.saved import load_run

    folder = tmp_path_factory.mktemp("large") / "large"
    return load_run(enlarged(run_folder, folder, prompts=64, responses=8, tokens=300))


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> dict[str, Checkpoint]:
    """Checkpoints that do not belong to `checkpoint`."""
    folder = tmp_path_factory.mktemp("other")
    return {
        "wider": make_checkpoint(folder / "wider", hidden=32),
        "deeper": make_checkpoint(folder / "deeper", layers=3),
        "shallower": make_checkpoint(folder / "shallower", layers=1),
        "fewer tokens": make_checkpoint(folder / "vocabulary", pieces=PIECES[:10]),
    }


@pytest.fixture(scope="session")
def direction(probe64):
    """Of length 2, at which first and second order are of the size of the values."""
    return tree.scale(0.05, random_like(probe64.params))


@pytest.fixture(scope="session")
def jet(probe64, direction):
    """Values, first and second derivatives of the statistics of `support.jets.BATCH`."""
    return seconds(probe64, BATCH, direction)
