"""A full disk, a limit on files, an interrupt: one line, and nothing half written."""

import math
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from funcprobe.adapters import resume
from funcprobe.adapters import run as run_module
from funcprobe.adapters.report import write as write_module
from funcprobe.adapters.report.figure import Figure
from funcprobe.adapters.sampling import batched as sampling_module
from funcprobe.adapters.stages import unchanged
from support.checkpoints import edit_json, sets
from support.commands import children, left_in

pytestmark = pytest.mark.usefixtures("offline", "quick")


@pytest.fixture
def quick(monkeypatch) -> None:
    """As on a machine that is quick enough for no progress to be written; test_resume.py has that."""
    monkeypatch.setattr(resume, "EVERY", math.inf)


# The disk fills up


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(command, checkpoint, monkeypatch) -> None:
    """Every write of a whole run in turn: Parquet, safetensors, text, and a rename."""
    Path("c.toml").touch()
    plans: list[Any] = []  # loading writes nothing: once is enough
    load = unchanged.load

    def load_once(*args: Any) -> Any:
        if not plans:
            plans.append(load(*args))
        return plans[0]

    monkeypatch.setattr(unchanged, "load", load_once)
    monkeypatch.setattr(run_module, "check", lambda *_: [])  # nor do the checks
    fail_at = 0
    for fail_at in range(1, 60):
        count = 0
        with monkeypatch.context() as patch:

            def failing(write: Callable[..., Any], fail_at: int = fail_at) -> Callable[..., Any]:
                def wrapped(*args: Any, **kwargs: Any) -> Any:
                    nonlocal count
                    count += ".holder" not in str(args[0])  # who holds a lock, which holds without
                    if count == fail_at:
                        raise OSError(28, "No space left on device")
                    return write(*args, **kwargs)

                return wrapped

            patch.setattr(pq, "write_table", failing(pq.write_table))
            patch.setattr("funcprobe.adapters.store.values.save_file", failing(save_file))
            patch.setattr(Path, "write_text", failing(Path.write_text))
            patch.setattr(Path, "write_bytes", failing(Path.write_bytes))
            patch.setattr(Path, "replace", failing(Path.replace))
            given = checkpoint.settings() | {"run.folder": f"runs{fail_at}", "measure.next_lr": False}
            given |= {"measure.etas": [1e-4], "sampling.max_new_tokens": 2, "sampling.B_E": 6}
            outcome = command("run", "c.toml", *sets(given))
        if count < fail_at:
            break
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.endswith("funcprobe: No space left on device; no incomplete file was left\n")
        assert left_in(Path(f"runs{fail_at}")) == []
    # Two rollouts, Y, first order, attribution, one eta, the rounding and two for the second
    # derivative: written and renamed, the rollouts as Parquet before; then ten files and the folder.
    assert fail_at == 9 * 2 + 2 + 10 + 1 + 1
    assert outcome.status == 0


@pytest.mark.slow
def test_in_a_process_of_its_own_one_line_stands_alone(tmp_path, checkpoint, damaged, other) -> None:
    """RLIMIT_FSIZE stops real writes in the middle: the Parquet of E, then the first-order file."""
    (tmp_path / "c.toml").touch()
    edit_json(damaged.base / "config.json", quantization_config={"quant_method": "gptq"})
    wider = damaged.settings() | {"policy.base": str(other["wider"].base)}
    cases = (
        (wider | {"policy.checkpoint": "/nowhere/x"}, "/nowhere/x: no such folder"),
        (wider, "has shape (2, 16), the base expects (2, 32)"),
        (damaged.settings(), "is quantised"),
    )
    limits = (1000, 12_000)
    given = [given for given, _ in cases]
    given += [checkpoint.settings() | {"run.folder": f"runs{limit}"} for limit in limits]
    commands = [["run", "c.toml", *sets(one)] for one in given]
    ended = children(commands, cwd=tmp_path, limits=[None] * len(cases) + [*limits])
    for outcome, (_, said) in zip(ended[: len(cases)], cases, strict=True):
        assert (outcome.status, outcome.out) == (2, "")
        (line,) = outcome.err.splitlines()
        assert line.startswith("funcprobe: ")
        assert said in line
    assert not (tmp_path / "runs").exists()
    for limit, outcome in zip(limits, ended[len(cases) :], strict=True):
        assert (outcome.status, outcome.out) == (2, "")
        last = outcome.err.splitlines()[-1]
        assert last.startswith("funcprobe: ")
        assert "File too large" in last
        assert "Traceback" not in outcome.err
        assert left_in(tmp_path / f"runs{limit}") == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 12_000


@pytest.fixture
def sigint() -> Iterator[None]:
    """As in the foreground: a shell's background job inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_interrupted(command, checkpoint, monkeypatch) -> None:
    """At the second prompt batch of E, then in the middle of the run folder."""
    Path("c.toml").touch()
    generate = sampling_module._generate
    calls = []

    def interrupting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return generate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sampling_module, "_generate", interrupting)
        outcome = command("run", "c.toml", *sets(checkpoint.settings()))
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err.splitlines()[-1].startswith("funcprobe: interrupted")
    assert "Traceback" not in outcome.err
    assert not any(path.is_file() for path in Path("runs").rglob("*"))

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "manifest", lambda _: signal.raise_signal(signal.SIGINT))
        outcome = command("run", "c.toml", *sets(checkpoint.settings()))
    assert outcome.status == 130
    assert left_in(Path("runs")) == []
    assert list(Path("runs/.stages").glob("rollouts-*"))


@pytest.fixture
def two_figures(monkeypatch) -> None:
    """A report of one page and two small figures, whatever charts there are."""
    shape = {"mark": "point", "data": {"values": [{"x": 1}]}, "encoding": {"x": {"field": "x"}}}
    made = {name: Figure(name, name, "of a test", "a point", shape) for name in ("one", "two")}
    monkeypatch.setattr(write_module, "figures", lambda _: made)
    monkeypatch.setattr(write_module, "report_html", lambda *_: "<!doctype html><p>new</p>")


def in_the_folder(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.usefixtures("two_figures")
def test_a_disk_that_is_full_at_any_write_of_a_report(command, checkpoint, monkeypatch) -> None:
    """The run's own files stay, and the earlier report as a whole."""
    Path("c.toml").touch()
    assert command("run", "c.toml", *sets(checkpoint.settings())).status == 0
    run = Path("runs/probe")
    (run / "report.html").write_text("old")
    (run / "figures").mkdir()
    (run / "figures/old.svg").write_text("old")
    before, fail_at = in_the_folder(run), 0
    for fail_at in range(1, 30):
        count = 0
        with monkeypatch.context() as patch:

            def failing(name: str, fail_at: int = fail_at) -> None:
                write = getattr(Path, name)

                def wrapped(*args: Any, **kwargs: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == fail_at:
                        raise OSError(28, "No space left on device")
                    return write(*args, **kwargs)

                patch.setattr(Path, name, wrapped)

            for name in ("write_text", "write_bytes"):
                failing(name)
            outcome = command("report", str(run))
        if count < fail_at:
            break
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err == "funcprobe: No space left on device; no incomplete file was left\n"
        assert in_the_folder(run) == before
    assert fail_at == 1 + 2 * 3 + 1  # the page, and of both figures SVG, PNG and caption
    after = in_the_folder(run)
    assert after.keys() - before.keys() == {
        f"figures/{name}.{kind}" for name in ("one", "two") for kind in ("svg", "png", "txt")
    }
    assert before.keys() - after.keys() == {"figures/old.svg"}
    assert after["report.html"].endswith(b"new</p>")


@pytest.mark.slow
@pytest.mark.usefixtures("two_figures", "sigint")
@pytest.mark.parametrize("how", ["a full disk", "an interrupt"])
def test_a_run_whose_report_is_not_written_is_whole(command, checkpoint, monkeypatch, how) -> None:
    """And the message says so: an hour of computation is not lost."""

    def stopping(*_: Any) -> None:
        if how == "a full disk":
            raise OSError(28, "No space left on device")
        signal.raise_signal(signal.SIGINT)

    Path("c.toml").touch()
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "write_figures", stopping)
        outcome = command("run", "c.toml", *sets(checkpoint.settings() | {"run.report": True}))
    run = Path("runs/probe")
    whole = f"{run} is whole but for its report: funcprobe report {run} writes it"
    if how == "a full disk":
        assert outcome.status == 2
        assert outcome.err.endswith(f"funcprobe: No space left on device; {whole}\n")
    else:
        assert outcome.status == 130
        assert outcome.err.splitlines()[-2] == whole
        assert outcome.err.splitlines()[-1].startswith("funcprobe: interrupted")
    assert {"results.json", "manifest.json", "tokens.parquet"} < {p.name for p in run.iterdir()}
    assert not [p for p in left_in(Path("runs")) if "figures" in p or "report" in p or "/." in p]
    assert command("report", str(run)).status == 0
    assert (run / "figures/two.png").is_file()
