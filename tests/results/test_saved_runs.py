"""Run folders as they are found: of earlier versions, with files gone, beside rules of another run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from funcprobe.adapters import whatif as whatif_module
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.report import afterwards, write_report
from funcprobe.adapters.results import SavedRun, load_run
from funcprobe.adapters.whatif import Question
from funcprobe.types import InputError
from support.checkpoints import sets
from support.saved_runs import copied


@pytest.fixture
def run(run_folder, tmp_path) -> Path:
    """A copy with its rules beside it."""
    return copied(run_folder, tmp_path / "one")


def rules_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.whatif.json")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_rules_of_the_run_are_its_own(run):
    found = load_run(run)
    assert found.whatif is not None
    assert found.whatif_left_out is None
    assert found.whatif.inputs is not None
    assert set(found.whatif.inputs) == {"seed", "checkpoint", "optimizer", "prompts", "rollouts"}


def test_rules_of_an_earlier_version_or_another_eta_are_too(run):
    """Without hashes the numbers decide; a learning rate of one's own is a question on the same run."""
    own = load_run(run).whatif
    assert own is not None

    def at_twice_the_rate(document: dict[str, Any]) -> None:
        del document["inputs"]
        document["is_next_lr"] = False
        document["learning_rate"]["value"] *= 2
        for rule in document["rules"]:
            rule["entropy"]["predicted"]["value"] *= 2

    edit(rules_of(run), at_twice_the_rate)
    found = load_run(run)
    assert found.whatif_left_out is None
    assert found.whatif is not None
    assert found.whatif.learning_rate.value == 2 * own.learning_rate.value


def _set(*place: Any, to: Any = None, times: float = 1.0) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *path, last = place
        for key in path:
            document = document[key]
        document[last] = document[last] * times if to is None else to

    return change


OTHER = {
    "counts": (_set("counts", "E_sequences", to=77), "E_sequences is 77, of this run 32"),
    "rule": (
        _set("conventions", "step", "rule", to="sgd"),
        "step is rule = sgd, max_grad_norm = 1.0, max_update = None, of this run rule = adamw",
    ),
    "temperature": (_set("conventions", "temperature", to=0.5), "temperature is 0.5, of this run 1.0"),
    "seed": (_set("inputs", "seed", to="4"), "seed is 4, of this run 0"),
    "checkpoint": (_set("inputs", "checkpoint", to="0" * 64), "checkpoint is another"),
    "learning rate": (
        _set("learning_rate", "value", times=2),
        "the next step's learning rate is 0.002",
    ),
    "entropy": (_set("entropy", "value", times=1.001), "the entropy is "),
    "derivative": (
        _set("rules", 0, "entropy", "predicted", "value", times=1.5),
        "its own rule has derivative ",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_rules_of_another_run_are_left_out_with_the_reason(run, name):
    change, reason = OTHER[name]
    edit(rules_of(run), change)
    found = load_run(run)
    assert found.whatif is None
    assert found.whatif_left_out is not None
    assert found.whatif_left_out.startswith(f"one.whatif.json is of another run: {reason}")
    assert found.whatif_left_out.endswith("; funcprobe whatif compares the rules again")
    assert "\n" not in found.whatif_left_out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ('{"schema_version": 9}', "schema_version 9"),
        ("{}", "differs from what"),
    ],
)
def test_damaged_rules_cost_no_report(run, text, reason):
    rules_of(run).write_text(text)
    found = load_run(run)
    assert found.whatif is None
    assert found.whatif_left_out is not None
    assert reason in found.whatif_left_out
    page = write_report(run).read_text(encoding="utf-8")
    assert escape(found.whatif_left_out) in page


@pytest.mark.slow
def test_without_log_config_and_rules_the_rest_is_read(run):
    for path in (run / "run.log", run / "config.toml", rules_of(run)):
        path.unlink()
    found = load_run(run)
    assert (found.config, found.log, found.whatif, found.whatif_left_out) == ("", "", None, None)
    assert write_report(run).is_file()


@pytest.mark.parametrize("name", ["run.log", "config.toml"])
def test_a_link_shows_no_file_of_the_readers(run, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("for my eyes", encoding="utf-8")
    (run / name).unlink()
    (run / name).symlink_to(secret)
    found = load_run(run)
    assert "my eyes" not in found.log + found.config


def test_the_run_folder_is_found_from_itself(run, monkeypatch):
    """`funcprobe report .`: its name is that of the folder, not "."."""
    monkeypatch.chdir(run)
    assert load_run(".").whatif is not None


@pytest.mark.parametrize("name", ["results.json", "manifest.json"])
def test_a_folder_without_its_documents_is_no_run(run, name):
    (run / name).unlink()
    with pytest.raises(InputError, match=rf"{name} cannot be read .*: give a run folder"):
        load_run(run)


# The report after `funcprobe whatif`


@pytest.fixture
def written(monkeypatch) -> list[SavedRun]:
    """The runs whose reports were written."""
    runs: list[SavedRun] = []
    monkeypatch.setattr(afterwards, "write_report", lambda folder: runs.append(load_run(folder)))
    return runs


def ask(checkpoint, run: Path, rule: str, **changes: Any) -> list[str]:
    """What is said by `funcprobe whatif` on the configuration of the run; stages are computed anew."""
    (run.parent / "c.toml").touch()
    given = {"run.folder": str(run.parent), "run.name": run.name, "run.report": True}
    given |= {"sampling.B_E": 32, **{key.replace("__", "."): x for key, x in changes.items()}}
    config = read_config(run.parent / "c.toml", sets(checkpoint.settings() | given)[1::2])
    narrator = Narrator()
    whatif_module.whatif(config, Question((rule,)), narrator)
    return narrator.lines


def test_the_report_has_the_rules_that_were_just_compared(checkpoint, run, written):
    ask(checkpoint, run, "negative_only")
    (found,) = written
    assert found.folder == run
    assert found.whatif is not None
    assert [rule.rule for rule in found.whatif.rules] == ["own", "negative_only"]


def test_the_report_of_another_run_stays_as_it_was(checkpoint, run, written):
    """Of the same name, with another seed: the file is of the question, and the run says why not."""
    lines = ask(checkpoint, run, "negative_only", run__seed=7)
    assert written == []
    assert lines[-1].startswith(
        f"the report in {run} is as it was: one.whatif.json is of another run: "
    )
    assert load_run(run).whatif is None


@pytest.mark.slow
def test_without_a_run_or_its_report_nothing_is_written(checkpoint, run, written, tmp_path):
    ask(checkpoint, run, "negative_only", run__report=False)
    ask(checkpoint, tmp_path / "new", "negative_only")
    assert written == []
    assert not (tmp_path / "new").exists()
    edit(run / "results.json", _set("schema_version", to=9))
    lines = ask(checkpoint, run, "negative_only")
    assert written == []
    assert "schema_version 9" in lines[-1]
