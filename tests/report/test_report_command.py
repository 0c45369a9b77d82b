"""`funcprobe report`: what it writes and opens, and in one line what it rejects."""

import json

import pytest

from support.saved_runs import copied


@pytest.fixture
def folder(run_folder, tmp_path):
    return copied(run_folder, tmp_path / "it's a run")


def test_it_writes_the_report_and_the_figures(command, folder):
    from funcprobe.adapters.report.charts import figures
    from funcprobe.adapters.results.saved import load_run

    (folder / "report.html").unlink(missing_ok=True)
    outcome = command("report", folder)
    assert outcome.status == 0
    assert outcome.out == f"wrote {folder / 'report.html'}\n"
    assert outcome.err == ""
    names = {path.name for path in (folder / "figures").iterdir()}
    drawn = figures(load_run(folder))
    assert len(drawn) > 5
    assert names == {f"{name}.{suffix}" for name in drawn for suffix in ("svg", "png", "txt")}
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("given", ["nothing", "empty", "file", "results.json"])
def test_what_is_no_run_folder_is_rejected_in_a_line(command, folder, given):
    places = {
        "nothing": folder.parent / "nothing",
        "empty": folder.parent / "empty",
        "file": folder.parent / "file",
        "results.json": folder / "results.json",
    }
    places["empty"].mkdir()
    places["file"].write_text("x")
    outcome = command("report", places[given])
    assert outcome.status == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert "give a run folder" in outcome.err
    assert not list(places["empty"].iterdir())


def test_another_version_is_rejected_in_a_line(command, folder):
    document = json.loads((folder / "results.json").read_text("utf-8"))
    (folder / "results.json").write_text(json.dumps(document | {"schema_version": 0}), "utf-8")
    (folder / "report.html").write_text("of that version", "utf-8")
    outcome = command("report", folder)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
    assert "schema_version 0" in outcome.err
    assert (folder / "report.html").read_text("utf-8") == "of that version"


def test_a_folder_that_cannot_be_written_is_rejected_first(command, folder, monkeypatch):
    """By a failure of the system's own call: to root every folder is writable."""

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    outcome = command("report", folder)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
    assert "Permission denied" in outcome.err
    assert "copy the run folder" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_it_is_opened_by_its_address(command, folder, monkeypatch, fails):
    opened = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("typer.launch", lambda url: opened.append(url) or int(fails))
    outcome = command("report", folder, "--open")
    assert outcome.status == 0
    assert opened == [(folder / "report.html").resolve().as_uri()]
    assert "%20a%20run/report.html" in opened[0]
    assert (opened[0] in outcome.out) == fails


@pytest.mark.slow
def test_without_a_display_the_address_is_said(command, folder, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("typer.launch", lambda url: pytest.fail("a browser was opened"))
    outcome = command("report", folder, "--open")
    assert outcome.status == 0
    assert "no display here" in outcome.out
    assert (folder / "report.html").resolve().as_uri() in outcome.out
