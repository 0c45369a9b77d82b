"""Stored stages: whose they are, bounded by size and age, cleared; locks of runs and of stages."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from funcprobe.adapters import store
from funcprobe.adapters.store import Stages, cache, leases, locks
from funcprobe.types import InputError
from support.commands import process

DAY = 86_400


def silent(_: str) -> None: ...


def filled(folder: Path, count: int = 4, size: int = 1000) -> list[Path]:
    """Stages of about `size` KiB each, the first the least recently used, a day apart."""
    paths = []
    for i in range(count):
        stages = Stages(folder, run=f"run-{i}")
        value = torch.full((size * 256,), float(i))
        stages.tensors("s", i, torch.zeros(0), lambda value=value: value)
        path = stages.place("s", i).path
        old = time.time() - (count - i) * DAY
        os.utime(path, (old, old))
        paths.append(path)
    return paths


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_every_stage_is_listed_with_its_run_and_last_use(tmp_path) -> None:
    paths = filled(tmp_path)
    (tmp_path / "notes.txt").write_text("somebody's")
    (tmp_path / "elsewhere-00000000000000000000.safetensors").symlink_to(paths[0])
    older = tmp_path / "rollouts-E-0123456789abcdef0123.parquet"
    older.write_bytes(b"of a version without checksums")
    progress = tmp_path / "gradient-0123456789abcdef0123.progress.safetensors"
    store.write_sealed(progress, {"a": torch.ones(2)}, {"run": "\x1b[31mred"})
    found = store.stored(tmp_path)
    assert [one.path for one in found] == [*paths, older, progress]
    assert [one.run for one in found] == [f"run-{i}" for i in range(4)] + ["", ""]
    assert [one.stage for one in found] == ["s"] * 4 + ["rollouts-E", "gradient"]
    assert [one.progress for one in found] == [False] * 5 + [True]
    assert [one.size for one in found] == [path.stat().st_size for path in (*paths, older, progress)]
    assert not any(one.in_use for one in found)
    assert store.stored(tmp_path / "none") == []


def test_reading_is_a_use(tmp_path) -> None:
    paths = filled(tmp_path)
    Stages(tmp_path).tensors("s", 0, torch.zeros(0), pytest.fail)
    assert [one.path for one in store.stored(tmp_path)] == [*paths[1:], paths[0]]


@pytest.mark.parametrize(
    ("size", "days", "left"),
    [
        (1.0, 30.0, 4),
        (2.5 / 1024, 30.0, 2),
        (1.0, 2.5, 2),
        (1.5 / 1024, 3.5, 1),
        (1e-9, 30.0, 0),
    ],
)
def test_the_least_recently_used_go_first(tmp_path, size, days, left) -> None:
    paths, said = filled(tmp_path), []
    (tmp_path / "notes.txt").write_text("somebody's")
    freed = store.bound(tmp_path, size, days, said.append)
    assert [one.path for one in freed.deleted] == paths[: 4 - left]
    assert there(tmp_path) == sorted(["notes.txt", *(path.name for path in paths[4 - left :])])
    assert len(said) == (left < 4)
    assert not freed.kept


def test_what_is_in_use_makes_no_room(tmp_path) -> None:
    """Of 4 MiB at most 2.5: the oldest is kept, so that two others go."""
    folder = tmp_path / ".stages"
    paths = filled(folder)
    used = paths[0].stat()
    with store.lease(tmp_path / "mine", silent) as own:
        own.use(paths[0])
        os.utime(paths[0], (used.st_atime, used.st_mtime))
        freed = store.bound(folder, 2.5 / 1024, 30.0, silent)
    assert [one.path for one in freed.deleted] == paths[1:3]
    assert [one.path for one in freed.kept] == paths[:1]


def test_what_a_run_in_progress_uses_is_kept(tmp_path) -> None:
    """Its own, read or written, and what it computes at the moment; of a killed run nothing is."""
    folder = tmp_path / ".stages"
    paths = filled(folder)
    with store.lease(tmp_path / "mine", silent) as own:
        stages = Stages(folder, lease=own)
        stages.tensors("s", 0, torch.zeros(0), pytest.fail)
        stages.tensors("new", 0, torch.zeros(0), lambda: torch.ones(3))

        def compute() -> torch.Tensor:
            place = stages.place("long", 0).path
            progress = place.with_suffix(".progress.safetensors")
            store.write_sealed(progress, {"a": torch.ones(1)}, {})
            freed = store.clear(folder, silent)
            assert [one.path for one in freed.deleted] == paths[1:]
            assert {one.stage for one in freed.kept} == {"s", "new", "long"}
            progress.unlink()
            return torch.zeros(1)

        stages.tensors("long", 0, torch.zeros(0), compute)
        assert store.bound(folder, 1e-9, 1e-9, silent).deleted == []
        assert {one.stage for one in store.stored(folder) if one.in_use} == {"s", "new", "long"}
    assert not any(one.in_use for one in store.stored(folder))
    assert len(store.clear(folder, silent).deleted) == 3
    assert there(folder) == []


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch) -> None:
    """Back by a year: no age below none, nothing is deleted by age; forward: what is in use stays."""
    folder, now = tmp_path / ".stages", time.time()
    paths = filled(folder)
    with store.lease(tmp_path / "mine", silent) as own:
        stages = Stages(folder, lease=own)
        stages.tensors("s", 3, torch.zeros(0), pytest.fail)
        monkeypatch.setattr(cache.time, "time", lambda: now - 365 * DAY)
        assert store.bound(folder, 1.0, 2.0, silent).deleted == []
        assert {one.age(cache.time.time()) for one in store.stored(folder)} == {0.0}
        assert [one.path for one in store.bound(folder, 2.5 / 1024, 2.0, silent).deleted] == paths[:2]
        monkeypatch.setattr(cache.time, "time", lambda: now + 365 * DAY)
        assert [one.path for one in store.bound(folder, 1.0, 30.0, silent).deleted] == [paths[2]]
        assert there(folder) == [paths[3].name]


def test_what_a_killed_process_had_begun_is_removed(tmp_path) -> None:
    folder = tmp_path / ".stages"
    (path, *_) = filled(folder)
    begun = [folder / f".{path.name}.4711", folder / f".{path.stem}.progress.safetensors.4711"]
    for one in begun:
        one.write_bytes(b"half")
    with locks.held(folder / "locks" / f"{path.stem}.lock", "it", silent):
        store.bound(folder, 1.0, 30.0, silent)
        assert all(one.exists() for one in begun)  # its owner may be writing them
    (folder / ".notes").touch()
    store.bound(folder, 1.0, 30.0, silent)
    assert not any(one.exists() for one in begun)
    assert (folder / ".notes").exists()


def test_the_command_lists_and_clears(command) -> None:
    folder = Path("runs/.stages")
    outcome = command("cache")
    assert (outcome.status, outcome.out) == (2, "")
    assert "there is no runs/.stages: give the folder of the runs" in outcome.err
    filled(folder)
    listed = command("cache", "runs")
    assert (listed.status, listed.err) == (0, "")
    rows = [line.split() for line in listed.out.splitlines()]
    assert [row[-1] for row in rows[1:5]] == [f"run-{i}" for i in range(4)]
    assert rows[1] == ["s", "1000.3", "KiB", "4.0", "days", "ago", "run-0"]
    assert rows[5] == ["4", "stages,", "3.9", "MiB", "in", "runs/.stages"]
    assert "2 stages, " in command("cache", "--older-than", "2.5").out
    assert len(there(folder)) == 4
    cleared = command("cache", "runs/.stages", "--clear", "--older-than", "2.5")
    assert cleared.out.splitlines()[-1] == "2 stages, 2.0 MiB deleted from runs/.stages"
    assert len(there(folder)) == 2
    with store.lease(Path("runs/mine"), silent) as own:
        own.use(folder / there(folder)[0])
        kept = command("cache", "--clear")
        assert "kept, as a run in progress uses them: 1 stage, 1000.3 KiB" in kept.out
    assert "0 stages, 0 B" not in command("cache", "--clear").out
    assert command("cache").out == "0 stages, 0 B in runs/.stages\n"


def test_a_second_run_of_one_name_is_told_who_holds_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(leases, "PATIENCE", 0.3)
    final, said = tmp_path / "one", []
    with store.lease(final, silent):
        start = time.monotonic()
        with (
            pytest.raises(
                InputError, match=rf"{final} is in use by process {os.getpid()} on .*, since 2"
            ),
            store.lease(final, said.append),
        ):
            pass
        assert time.monotonic() - start > 0.3
        with store.lease(tmp_path / "two", silent):
            pass
    assert len(said) == 1
    assert said[0].endswith("waiting for it")
    with store.lease(final, silent):
        pass
    assert list(tmp_path.iterdir()) == []  # locks leave nothing


def test_the_second_run_goes_on_when_the_first_ends(tmp_path) -> None:
    final, order, entered = tmp_path / "one", [], threading.Event()

    def first() -> None:
        with store.lease(final, silent):
            entered.set()
            time.sleep(0.8)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with store.lease(final, silent):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_of_a_killed_process_is_free(tmp_path) -> None:
    """And what it left is removed; the run that it had moved away comes back."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from funcprobe.adapters import store

        with store.lease(Path(sys.argv[1]), print) as own:
            own.use(Path("s-0.safetensors"))
            Path(sys.argv[1]).with_name(".one.abcd1234").mkdir()
            Path(sys.argv[1]).rename(Path(sys.argv[1]).with_name(".one.abcd1234.old"))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    final = tmp_path / "one"
    final.mkdir()
    (final / "manifest.json").write_text("whole")
    (tmp_path / ".one.two.abcd1234").mkdir()  # of another run, "one.two"
    assert process(script, str(final), cwd=tmp_path).returncode == -9
    assert not final.exists()
    left = tmp_path / ".stages/locks/run-one.lock"
    assert json.loads(left.with_name("run-one.lock.holder").read_text())["uses"] == ["s-0.safetensors"]
    assert not locks.is_held(left)
    assert leases.in_use(tmp_path / ".stages") == set()
    with store.lease(final, pytest.fail):
        assert (final / "manifest.json").read_text() == "whole"
        assert not (tmp_path / ".one.abcd1234").exists()
        assert (tmp_path / ".one.two.abcd1234").exists()


def test_two_runs_compute_a_stage_once(tmp_path) -> None:
    """The second waits and reads; where the first fails, the second computes."""
    calls, started, said = [], threading.Event(), []

    def slow() -> torch.Tensor:
        calls.append(1)
        started.set()
        time.sleep(1.0)
        return torch.ones(2)

    def failing() -> torch.Tensor:
        slow()
        raise ZeroDivisionError

    for compute, expected in ((slow, 1), (failing, 2)):
        calls.clear()
        started.clear()
        folder = tmp_path / compute.__name__

        def first(compute=compute, folder=folder) -> None:
            try:
                Stages(folder).tensors("s", 0, torch.zeros(0), compute)
            except ZeroDivisionError:
                calls.append(0)

        thread = threading.Thread(target=first)
        thread.start()
        started.wait()
        found = Stages(folder, say=said.append).tensors("s", 0, torch.zeros(0), slow)
        thread.join()
        assert torch.equal(found, torch.ones(2))
        assert sum(calls) == expected
    assert len(said) == 2
    assert all(line.startswith("stage s-") and line.endswith("waiting for it") for line in said)


def test_a_lock_holds_without_the_file_that_says_who_has_it(tmp_path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(leases, "PATIENCE", 0.1)
    with store.lease(tmp_path / "one", silent) as own:
        own.use(Path("s-0.safetensors"))
        with pytest.raises(InputError, match="in use by another process: wait for it"):
            store.lease(tmp_path / "one", silent).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch) -> None:
    for error in (OSError(37, "No locks available"), NotImplementedError()):
        said: list[str] = []

        def refuse(*_: object, error=error, **__: object) -> None:
            raise error

        monkeypatch.setattr(locks.FileLock, "acquire", refuse)
        with locks.held(tmp_path / "a" / "b.lock", "it", said.append):
            pass
        assert len(said) == 1
        assert "has no file locks" in said[0]
    monkeypatch.setattr(
        locks.FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "x"))
    )
    with pytest.raises(OSError, match="x"), locks.held(tmp_path / "b.lock", "it", silent):
        pass
