"""What a run says before it starts: tokens as it then counts them, and a time by a trial."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from funcprobe.adapters import run as run_module
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator, duration
from funcprobe.adapters.rollouts import load_rollouts, save_rollouts
from funcprobe.adapters.stages import forecast as module
from funcprobe.adapters.stages.forecast import Forecast, Part, forecast, forecast_line, short
from funcprobe.adapters.stages.peaks import Curve
from funcprobe.adapters.stages.plan import load as load_plan
from support.checkpoints import sets
from support.slow import first

OTHERS = {
    "exact": {"measure.second_order": "exact"},
    "none": {"measure.second_order": "none", "attribution.level": "off"},
    "kl": {"measure.observables": ["kl_base", "length"]},
    "influence": {"attribution.influence": 2},
}


def supplied(run_one: Path, folder: Path) -> dict[str, object]:
    """E and U as files, so that their lengths are known before a run."""
    found = {}
    for key, name in (("rollouts.eval", "eval"), ("rollouts.update", "update")):
        rollouts = load_rollouts(run_one / "rollouts" / f"{name}.parquet", 14, rewards=name == "update")
        path = folder / f"{name}.parquet"
        save_rollouts(rollouts, path)
        found[key] = str(path)
    return found


@pytest.mark.parametrize("given", first(1, [{}, *OTHERS.values()]), ids=["default", *OTHERS])
def test_tokens_and_passes_are_those_that_the_run_counts(checkpoint, run_one, tmp_path, given):
    (tmp_path / "c.toml").touch()
    settings = checkpoint.settings() | supplied(run_one, tmp_path) | given
    settings |= {"run.folder": str(tmp_path / "runs"), "run.name": "one"}
    config = read_config(tmp_path / "c.toml", sets(settings)[1::2])
    kl = "kl_base" in (config.measure.observables or ())
    found = forecast(load_plan(config, Narrator()), Narrator(), kl=kl)
    narrator = Narrator(Console(file=io.StringIO()))
    total = run_module.run(config, narrator)[0].cost.total
    assert found.E.passes == pytest.approx(total.passes["E"], rel=0.05)
    assert found.U.passes == pytest.approx(total.passes["U"], rel=0.35)  # twice along P X if clipped
    assert found.tokens == pytest.approx(total.tokens, rel=0.15)
    assert found.drawn == 0
    assert found.seconds > 0
    (line,) = [x for x in narrator.lines if "tokens through the model in" in x]
    assert f"{found.E.passes:.3g} passes over E and {found.U.passes:.3g} over U: some " in line


def test_responses_are_taken_to_be_as_long_as_they_may(checkpoint, tmp_path):
    (tmp_path / "c.toml").touch()
    config = read_config(tmp_path / "c.toml", sets(checkpoint.settings())[1::2])
    plan = load_plan(config, Narrator())
    found, sampling = forecast(plan, Narrator()), config.sampling
    shortest, longest = (f(len(ids) for ids in plan.prompt_ids) for f in (min, max))
    responses = sampling.B_E + sampling.B_U * sampling.G
    low, high = (responses * (n + sampling.max_new_tokens - 1) for n in (shortest, longest))
    assert low <= found.drawn <= high
    assert sampling.B_E * sampling.max_new_tokens <= found.E.tokens <= high
    assert "with the longest responses" in forecast_line(found)


def test_the_time_is_by_the_trial(monkeypatch, checkpoint, tmp_path):
    """A forward of 1 ms a token, and 5 ms for each further token of two prompts."""
    monkeypatch.setattr(module, "_seconds_a_token", lambda plan, E: 1e-3)
    monkeypatch.setattr(module, "seconds_of_a_step", lambda policy, ids, sampling: 5e-3)
    (tmp_path / "c.toml").touch()
    given = {"sampling.B_E": 4, "sampling.B_U": 2, "sampling.G": 2, "sampling.max_new_tokens": 3}
    given |= {"sampling.generation_batch": 4}
    config = read_config(tmp_path / "c.toml", sets(checkpoint.settings() | given)[1::2])
    plan = load_plan(config, Narrator())
    found = forecast(plan, Narrator())
    passes = sum(part.tokens * part.forwards for part in (found.E, found.U)) * 1e-3
    prompts = [max(len(ids) for ids in plan.prompt_ids)] * 2  # of two batches, at most
    most = sum(4 * 1e-3 * longest + 2 * (5e-3 + 2e-3) for longest in prompts)
    assert passes + 2 * 2 * 7e-3 < found.seconds <= passes + most + 1e-9


def test_what_a_first_forward_loads_is_no_time_of_a_forward(monkeypatch, checkpoint, tmp_path):
    """A forward of 1 ms a token, of which the first of each size takes a minute more."""
    seen: set[int] = set()

    def timed(plan, forward, batch):
        count = len(batch.prompt_N)
        first = 0.0 if count in seen else 60.0
        seen.add(count)
        return first + 1e-3 * module._tokens(batch, plan)

    monkeypatch.setattr(module, "_timed", timed)
    (tmp_path / "c.toml").touch()
    plan = load_plan(read_config(tmp_path / "c.toml", sets(checkpoint.settings())[1::2]), Narrator())
    E = module._batch(plan, "E", None)
    assert module._seconds_a_token(plan, E) == pytest.approx(1e-3, rel=1e-12)
    assert seen


def test_a_trial_that_fails_leaves_the_tokens(monkeypatch, checkpoint, tmp_path):
    def fails(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(module, "seconds_of_a_step", fails)
    (tmp_path / "c.toml").touch()
    config = read_config(tmp_path / "c.toml", sets(checkpoint.settings())[1::2])
    found = forecast(load_plan(config, Narrator()), Narrator())
    assert found.seconds is None
    assert "some" not in forecast_line(found)


@pytest.mark.parametrize("level", ["off", "summary"])
def test_the_peak_is_of_the_largest_pass(monkeypatch, checkpoint, tmp_path, level):
    """With attribution gradients go over E in 16 blocks, here of three sequences; U has four of 11."""
    (tmp_path / "c.toml").touch()
    given = {"sampling.B_E": 40, "sampling.B_U": 2, "sampling.G": 2}
    given |= {"run.max_tokens": 100, "attribution.level": level}
    config = read_config(tmp_path / "c.toml", sets(checkpoint.settings() | given)[1::2])
    plan = load_plan(config, Narrator())
    monkeypatch.setattr(module.memory, "now", lambda _: 10**9)
    monkeypatch.setattr(module.memory, "can_measure", lambda _: True)
    for gradient, tangents in ((1e4, 1.0), (1.0, 1e4)):  # bytes a token
        curves = [Curve(0.0, gradient, 0.0, 11), Curve(0.0, tangents, 0.0, 11)]
        monkeypatch.setattr(module, "_curve", lambda *_, of=curves: of.pop(0))
        tokens = (module.peak_memory(plan) - 10**9) / 1e4
        assert 30 <= tokens <= 40 if gradient > tangents and level != "off" else 70 <= tokens <= 100


def test_a_dry_run_says_time_and_memory_and_writes_nothing(command, checkpoint):
    Path("c.toml").touch()
    outcome = command("run", "c.toml", "--dry-run", *sets(checkpoint.settings()))
    assert outcome.status == 0
    assert re.search(r"^about [\d.]+ k tokens through .* on this machine", outcome.err, re.MULTILINE)
    (gib,) = re.findall(r"^about ([\d.]+) GiB of memory at its peak", outcome.err, re.MULTILINE)
    assert 0.1 < float(gib) < 10
    assert not Path("runs").exists()


def test_lines_have_two_digits():
    part = Part(100_000, 12.125, 15.0)
    found = Forecast(part, Part(20_000, 3.0, 7.0), 50_000, 371.0)
    assert forecast_line(found) == (
        "about 1.3 M tokens through the model in 12.1 passes over E and 3 over U, after up to 50 k of "
        "sampling: some 6 min on this machine, with the longest responses"
    )
    assert forecast_line(found, stored=True).endswith(", less what an earlier run left in .stages")
    assert [duration(x) for x in (0.2, 7.4, 43.0, 371.0, 3 * 3600, 9e4)] == [
        *("1 s", "7 s", "40 s", "6 min", "3 h", "25 h")
    ]
    assert [short(x) for x in (999, 1500, 123_456, 1_234_567)] == ["999", "1.5 k", "123 k", "1.2 M"]


def test_bars_and_log_lines_say_what_is_left_of_the_run(monkeypatch):
    clock = iter([0.0, 0.0, 31.0, 62.0, 401.0, 402.0])
    monkeypatch.setattr("funcprobe.adapters.console.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    narrator = Narrator(Console(file=stream, highlight=False, width=200))
    narrator.expect(400.0)
    with narrator.phase("measure", 10) as stage:
        stage.advance(2)
        stage.advance(2)
        stage.advance(2)  # beyond what was foretold: nothing more is said of the run
    assert stream.getvalue().splitlines() == [
        "measure: 2 of 10 sequences, 31 s, about 124 s left (run: some 6 min left)",
        "measure: 4 of 10 sequences, 62 s, about 93 s left (run: some 6 min left)",
        "measure: 6 of 10 sequences, 401 s, about 267 s left",
        "measure: 402.0 s",
    ]
