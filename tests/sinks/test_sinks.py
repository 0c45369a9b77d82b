"""log.to: the programs hold the numbers of results.json, without a network; a failure loses no run."""

import io
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from funcprobe.adapters import sinks
from funcprobe.adapters.config.file import read_config, to_toml
from funcprobe.adapters.config.log import LogConfig
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.report.write import write_report
from funcprobe.adapters.results import load
from funcprobe.adapters.results.verdict import verdict_line
from funcprobe.adapters.sinks import registry
from funcprobe.types import InputError
from support.checkpoints import sets
from support.offline import OFFLINE

STEP = 20


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory) -> Path:
    """A run of a checkpoint of step 20, to be logged to all three."""
    place = tmp_path_factory.mktemp("logged")
    copy = place / "seen"
    shutil.copytree(run_folder, copy)
    config = read_config(copy / "config.toml")
    checkpoint = place / "checkpoint-20"
    shutil.copytree(config.policy.checkpoint, checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": STEP}))
    changes = {
        "policy": config.policy.model_copy(update={"checkpoint": str(checkpoint)}),
        "log": LogConfig(to=("wandb", "trackio", "tensorboard"), project="probes", group="lr-1e-5"),
    }
    (copy / "config.toml").write_text(to_toml(config.model_copy(update=changes)))
    write_report(copy)
    return copy


@pytest.fixture(scope="module")
def home(folder) -> Path:
    """Where a process that cannot reach a network logged the run, and that said what it did."""
    home = folder.parent / "home"
    home.mkdir()
    code = f"""{OFFLINE}
from pathlib import Path
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.sinks import send
send(Path({str(folder)!r}), Narrator())
"""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    given = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(home / "trackio"), "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=home,
        env=kept | given,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("log: ")]  # seconds
    programs = ("wandb", "trackio", "tensorboard")
    assert [line.split(": ")[0] for line in lines] == [f"logged to {name}" for name in programs]
    return home


@pytest.fixture(scope="module")
def written(folder) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def expected(written) -> dict[str, float]:
    """Keys to the numbers of results.json, by their places in it."""
    first = written["first_order"]
    (row,) = [row for row in written["sweep"] if row["is_next_lr"]]
    found = {
        **bounded("entropy", written["entropy"], written["entropy_interval"]),
        **bounded("derivative", first["derivative"], first["interval_total"]),
        "derivative_from_update": first["from_update"]["value"],
        "derivative_from_momentum": first["from_momentum"]["value"],
        "derivative_from_weight_decay": first["from_weight_decay"]["value"],
        "lr": written["next_lr"]["value"],
        **bounded("predicted", row["predicted"], row["interval_total"]),
        **bounded("measured", row["measured"], row["measured_interval_given_U"]),
        "ratio": row["ratio"]["value"],
        "ess": row["ess"]["value"],
        "predicted_relative": written["verdict"]["relative"],
        "predicted_relative_low": written["verdict"]["low"],
        "predicted_relative_high": written["verdict"]["high"],
        "reward": written["mean_reward"]["value"],
        "checks": len(written["checks"]),
        "checks_passed": sum(check["passed"] for check in written["checks"]),
    }
    assert written["observables"]
    for one in written["observables"]:
        name = f"observable/{one['name'].rpartition(':')[2]}"
        (at,) = [at for at in one["sweep"] if at["is_next_lr"]]
        found |= bounded(name, one["at_theta"], one["interval"])
        found |= bounded(f"{name}/predicted", at["predicted"], at["interval_given_U"])
        found |= bounded(f"{name}/measured", at["measured"], at["measured_interval_given_U"])
    return {f"funcprobe/{key}": value for key, value in found.items() if value is not None}


def bounded(name: str, quantity: dict[str, Any], interval: dict[str, Any] | None) -> dict[str, Any]:
    low, high = (interval["low"], interval["high"]) if interval else (None, None)
    return {name: quantity["value"], f"{name}_low": low, f"{name}_high": high}


def rows(written: dict[str, Any]) -> list[list[float]]:
    return [
        [row["eta"], row["predicted"]["value"], row["measured"]["value"]] for row in written["sweep"]
    ]


@pytest.mark.slow
def test_tensorboard_holds_the_runs_numbers(folder, home, expected, written):
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, TENSORS, EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "tensorboard"), {TENSORS: 0, IMAGES: 0}).Reload()
    texts, numbers = {}, {}
    for tag in events.Tags()["tensors"]:
        (event,) = events.Tensors(tag)
        assert event.step == STEP
        value = make_ndarray(event.tensor_proto).reshape(-1)[0]
        (texts if isinstance(value, bytes) else numbers)[tag.removesuffix("/text_summary")] = value
    assert numbers == expected  # to the last bit: in double precision
    assert len(numbers) > 20
    assert texts["funcprobe/headline"].decode().strip() == verdict_line(load(folder))
    table = texts["funcprobe/sweep"].decode().splitlines()
    shown = [float(cell) for line in table[2:] for cell in line.split("|")[1:3]]
    stored = [number for row in rows(written) for number in row[:2]]
    assert shown == pytest.approx(stored, rel=1e-5, abs=0)  # six digits are shown
    assert str(folder / "report.html") in texts["funcprobe/report"].decode()
    figures = {path.stem: path for path in (folder / "figures").glob("*.png")}
    assert set(events.Tags()["images"]) == {f"funcprobe/{name}" for name in figures} != set()
    for name, path in figures.items():
        (image,) = events.Images(f"funcprobe/{name}")
        with Image.open(io.BytesIO(image.encoded_image_string)) as found, Image.open(path) as written:
            assert np.array_equal(found.convert("RGB"), written.convert("RGB"))


def test_wandb_holds_the_runs_numbers(folder, home, expected, written):
    (file,) = home.glob("wandb/offline-run-*/run-*.wandb")
    kept = list(records(file))
    (history,) = [record.history for record in kept if record.WhichOneof("record_type") == "history"]
    found = {
        (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in history.item
    }
    assert {key: value for key, value in found.items() if key in expected} == expected
    assert found["_step"] == STEP
    (run,) = [record.run for record in kept if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.display_name) == ("probes", "lr-1e-5", "seen")
    artifacts = [record.artifact for record in kept if record.WhichOneof("record_type") == "artifact"]
    (report,) = [one for one in artifacts if one.name == "seen-report"]
    assert {entry.path for entry in report.manifest.contents} == {
        "report.html", "results.json", "config.toml"
    }  # fmt: skip
    (table,) = home.glob("wandb/offline-run-*/files/media/table/funcprobe/sweep_*.table.json")
    found = json.loads(table.read_text())
    places = [found["columns"].index(name) for name in ("eta", "predicted", "measured")]
    assert [[row[i] for i in places] for row in found["data"]] == rows(written)
    assert len(list(home.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == len(
        list((folder / "figures").glob("*.png"))
    )


def records(file: Path) -> Iterator[Any]:
    """Of an offline run: LevelDB's log of protobufs, in blocks of 32 KiB, after seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, block, head = file.read_bytes(), 32768, 7
    assert data.startswith(b":W&B")
    at, part = head, b""
    while at + head <= len(data):
        if block - at % block < head:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + head])
        part += data[at + head : at + head + length]
        at += head + length
        if kind in {1, 4}:  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def test_trackio_holds_the_runs_numbers(folder, home, expected, written):
    with sqlite3.connect(home / "trackio" / "probes.db") as database:
        ((name, step, text),) = database.execute(
            "SELECT run_name, step, metrics FROM metrics"
        ).fetchall()
        ((artifact, manifest),) = database.execute(
            "SELECT name, manifest FROM artifacts JOIN artifact_versions ON artifact_id = artifacts.id"
        ).fetchall()
    found = json.loads(text)
    assert {key: value for key, value in found.items() if key in expected} == expected
    assert (name, step, artifact) == ("seen", STEP, "seen-report")
    assert {entry["path"] for entry in json.loads(manifest)} == {
        "report.html", "results.json", "config.toml"
    }  # fmt: skip
    table = found["funcprobe/sweep"]["_value"]
    assert [[row["eta"], row["predicted"], row["measured"]] for row in table] == rows(written)
    figures = {path.name for path in (folder / "figures").glob("*.png")}
    assert sum(key.startswith("funcprobe/figures/") for key in found) == len(figures) > 0


def test_a_package_that_is_missing_is_found_before_the_run(command, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "trackio" else True)
    (tmp_path / "c.toml").touch()
    for flags in ((), ("--dry-run",)):
        outcome = command(
            "run", "c.toml", *sets(checkpoint.settings() | {"log.to": ["trackio"]}), *flags
        )
        assert outcome.status == 2
        (line,) = [line for line in outcome.err.splitlines() if line.startswith("funcprobe: ")]
        assert 'pip install "funcprobe[trackio]"' in line
    assert not list(tmp_path.glob("runs/*"))


def test_a_key_that_is_missing_is_found_before_the_run(monkeypatch):
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    asked: dict[str, Any] = {}

    def login(**given: Any) -> None:
        asked.update(given)
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    stub = {"Settings": SimpleNamespace, "setup": lambda settings: None, "login": login}
    vars(module).update(stub)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(
        InputError, match=r"No API key configured\. Use `wandb login` to log in"
    ) as caught:
        sinks.require(LogConfig(to=("wandb",)))
    assert "\n" not in str(caught.value)
    assert asked == {"verify": True}


def test_a_log_that_fails_loses_neither_the_run_nor_the_other_logs(
    command, checkpoint, monkeypatch, tmp_path
):
    def fails(run, folder):
        raise ConnectionError("the server\nis away")

    sink = registry.SINKS["wandb"]
    monkeypatch.setitem(registry.SINKS, "wandb", sink._replace(prepare=lambda: None, write=fails))
    given = checkpoint.settings() | {"run.name": "one", "log.to": ["wandb", "tensorboard"]}
    (tmp_path / "c.toml").touch()
    outcome = command("run", "c.toml", *sets(given))
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith(
        "funcprobe: the run is whole in runs/one, but was not logged: wandb: the server is away"
    )
    assert last.endswith("funcprobe run runs/one/config.toml logs it again, from stored stages")
    assert load(tmp_path / "runs" / "one").sweep
    assert "sanity checks: " in outcome.out
    assert list((tmp_path / "runs" / "one" / "tensorboard").glob("events.out.tfevents.*"))
    assert not list(tmp_path.glob("runs/.one.*"))


def test_runs_that_share_a_folder_make_one_curve(folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    for step in (10, 20):
        copy = tmp_path / f"run-{step}"
        shutil.copytree(folder, copy)
        config = read_config(copy / "config.toml")
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        changes = {
            "policy": config.policy.model_copy(update={"checkpoint": str(checkpoint)}),
            "log": LogConfig(to=("tensorboard", "tensorboard"), folder=str(tmp_path / "shared")),
        }
        (copy / "config.toml").write_text(to_toml(config.model_copy(update=changes)))
        sinks.send(copy, Narrator(Console(file=io.StringIO())))
    events = EventAccumulator(str(tmp_path / "shared"), {TENSORS: 0}).Reload()
    assert [event.step for event in events.Tensors("funcprobe/entropy")] == [10, 20]


def test_off_by_default(run_folder, monkeypatch):
    narrator = Narrator(Console(file=io.StringIO()))
    sinks.send(run_folder, narrator)
    assert narrator.lines == []
    assert not (run_folder / "tensorboard").exists()
