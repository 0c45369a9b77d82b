"""Signals end a process in a line, never between two steps of a write."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from funcprobe.adapters import run as run_module
from funcprobe.adapters.machine import ending
from funcprobe.adapters.machine.ending import UNBROKEN, ended_by_signals
from funcprobe.adapters.store import whole, whole_folder, write_whole
from support.checkpoints import sets
from support.commands import left_in
from support.slow import first

STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
each_signal = pytest.mark.parametrize("name", STATUS)


@pytest.fixture(autouse=True)
def foreground():
    """Handlers as of a process that a terminal started; a shell's background job ignores SIGINT."""
    before = {one: signal.getsignal(one) for one in ending.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@each_signal
def test_a_signal_within_a_write_waits_for_its_end(tmp_path, monkeypatch, name) -> None:
    """Between any two of its steps: renames, the deletion of what was there before."""
    final, number, replace = tmp_path / "one", getattr(signal, name), Path.replace
    for text in ("first", "second"):
        for place in ("before", "after"):

            def signalled(self: Path, there: Path, place: str = place) -> Path:
                if place == "before":
                    signal.raise_signal(number)
                found = replace(self, there)
                if place == "after":
                    signal.raise_signal(number)
                return found

            monkeypatch.setattr(Path, "replace", signalled)
            with ended_by_signals():
                with pytest.raises(KeyboardInterrupt), whole_folder(final) as target:
                    (target / f"{text}.txt").write_text(text)
                with pytest.raises(KeyboardInterrupt):
                    write_whole(tmp_path / "file", lambda path: path.write_text(text))  # noqa: B023
            assert UNBROKEN.received == number
            monkeypatch.undo()
            assert [path.name for path in final.iterdir()] == [f"{text}.txt"]
            assert (tmp_path / "file").read_text() == text
            assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "one"]


@each_signal
def test_a_signal_before_a_write_is_complete_leaves_what_was_there(tmp_path, name) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        signal.raise_signal(getattr(signal, name))
        raise AssertionError("the signal ends it here")

    (tmp_path / "file").write_text("old")
    with ended_by_signals():
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "file", write)
        with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "one") as target:
            write(target / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_signals_that_were_ignored_stay_so() -> None:
    """By nohup, or a shell's job in the background; and handlers come back at the end."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ended_by_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == UNBROKEN.handle
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    kept: list[Any] = []

    def elsewhere() -> None:  # as in a server's thread, where no handler can be set
        with ended_by_signals(), UNBROKEN, UNBROKEN.interruptible():
            kept.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert kept == [signal.SIG_DFL]


@pytest.mark.parametrize("name", first(1, STATUS))
def test_a_run_that_a_signal_ends(command, checkpoint, monkeypatch, name) -> None:
    """One line and the status of the signal; nothing half written; the same command goes on."""
    Path("c.toml").touch()
    given = checkpoint.settings() | {"measure.next_lr": False, "measure.etas": [1e-4]}
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "manifest", lambda _: signal.raise_signal(number))
        outcome = command("run", "c.toml", *sets(given))
    assert (outcome.status, outcome.out) == (STATUS[name], "")
    said = outcome.err.splitlines()[-1]
    assert said == f"funcprobe: {ending.words(number)}"
    assert said.endswith("finished stages are stored, no incomplete file was left")
    assert "Traceback" not in outcome.err
    assert left_in(Path("runs")) == []
    assert not list(Path("runs/.stages").glob("locks/*"))
    with monkeypatch.context() as patch:
        patch.setattr("funcprobe.adapters.stages.batches.sample_responses", pytest.fail)
        assert command("run", "c.toml", *sets(given)).status == 0


def test_the_status_is_the_signals_wherever_it_comes(tmp_path) -> None:
    """Also in a text that is executed, as that of a data class while a library is loaded."""
    (tmp_path / "program.py").write_text(
        "import signal\n"
        "from funcprobe.adapters import cli\n"
        "cli.app = lambda **_: exec('signal.raise_signal(signal.SIGTERM)')\n"
        "cli.main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "program"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 143
    assert ended.stderr == f"funcprobe: {ending.words(signal.SIGTERM)}\n"


def test_a_closed_terminal_takes_no_line(command, monkeypatch) -> None:
    """Writing to it is an error, which does not hide what ended the process."""

    def closed(*_: object) -> None:
        signal.raise_signal(signal.SIGHUP)

    def dead(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("funcprobe.adapters.commands.probing.read_config", closed)
    monkeypatch.setattr("typer.echo", dead)
    assert command("run", "c.toml").status == 129


@pytest.mark.parametrize("code", ["EBUSY", "ESTALE", "EXDEV", "ENOSPC", "EDQUOT", "EROFS"])
def test_a_rename_that_fails(tmp_path, monkeypatch, code) -> None:
    """As on a network file system: tried again where that passes, else what was there stays."""
    number, replace, calls = getattr(errno, code), Path.replace, []
    monkeypatch.setattr(whole, "RETRIES", (0.0, 0.0, 0.0))
    passes = code in ("EBUSY", "ESTALE")
    for fails in (2, 99):
        calls.clear()
        (tmp_path / "file").write_text("old")

        def failing(self: Path, there: Path, fails: int = fails) -> Path:
            calls.append(1)
            if len(calls) <= fails:
                raise OSError(number, os.strerror(number))
            return replace(self, there)

        monkeypatch.setattr(Path, "replace", failing)
        if passes and fails == 2:
            write_whole(tmp_path / "file", lambda path: path.write_text("new"))
            assert (tmp_path / "file").read_text() == "new"
        else:
            with pytest.raises(OSError, match=os.strerror(number)[:10]):
                write_whole(tmp_path / "file", lambda path: path.write_text("new"))
            assert (tmp_path / "file").read_text() == "old"
            assert len(calls) == (4 if passes else 1)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
