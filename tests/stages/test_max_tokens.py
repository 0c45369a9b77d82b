"""The size of a microbatch, by trial."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.machine import memory
from funcprobe.adapters.stages import max_tokens
from funcprobe.adapters.stages.max_tokens import Trial, choose, fitted
from funcprobe.types import InputError
from support.checkpoints import sets
from support.policies import tiny_policy


def test_the_size_is_the_largest_power_of_two_in_half_of_what_is_free() -> None:
    """100 bytes at rest and 10 a token."""
    small, large = Trial(100, 1100.0), Trial(200, 2100.0)

    def size(room: float, longest: int = 8, most: int = 4096) -> int:
        return fitted(small, large, longest=longest, room=room, most=most)

    assert size(2 * (100 + 10 * 256)) == 256
    assert size(2 * (100 + 10 * 256) - 1) == 128
    assert size(1e12) == 4096
    assert size(1e12, most=32768) == 32768
    # One sequence may take all of it, and may be longer than `most`.
    assert size(2 * (100 + 10 * 256), longest=300) == 300
    assert size(100 + 10 * 300, longest=300) == 300
    assert size(1e12, longest=5000) == 5000
    with pytest.raises(InputError, match=r"may have 300 tokens.* takes 0 MiB; 0 MiB are free"):
        size(100 + 10 * 300 - 1, longest=300)
    # Memory that does not grow, as far as the trials see.
    assert fitted(Trial(100, 50.0), Trial(200, 40.0), longest=8, room=1e3, most=4096) == 4096


@pytest.fixture
def measured(monkeypatch) -> funcprobe.Probe:
    """A policy on a machine that takes 10,000 bytes for every token since the last reset."""
    probe = funcprobe.bind(tiny_policy())
    held: Counter = Counter()

    def hidden(params: funcprobe.Params, rows: Any) -> torch.Tensor:
        held["now"] += 10_000 * rows.tokens
        return probe.forward.hidden(params, rows)

    monkeypatch.setattr(max_tokens, "TRIAL_TOKENS", 100)
    monkeypatch.setattr(memory, "process_now", lambda: 0)
    monkeypatch.setattr(memory, "process_peak", lambda: held["now"])
    monkeypatch.setattr(memory, "reset_peaks", lambda: not held.clear())
    return probe._replace(forward=probe.forward._replace(hidden=hidden))


def test_two_trials_find_what_a_token_takes(measured, monkeypatch) -> None:
    cpu = torch.device("cpu")
    for room, expected in ((2 * 10_000 * 1500, 1024), (10**12, 4096), (2 * 10_000 * 50, 32)):
        monkeypatch.setattr(memory, "free", lambda _, room=room: room)
        found = choose(measured.params, measured.forward, 7, 5, 11, cpu)
        assert found.max_tokens == expected
        assert found.message.startswith(f"run.max_tokens = {expected} (auto): 10 KiB a token")
    monkeypatch.setattr(memory, "free", lambda _: 100_000)
    with pytest.raises(InputError, match="lower sampling"):
        choose(measured.params, measured.forward, 7, 5, 11, cpu)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory")])
def test_a_trial_that_runs_out_of_memory(measured, error) -> None:
    def short(most: int) -> Any:
        def hidden(params: funcprobe.Params, rows: Any) -> torch.Tensor:
            if rows.tokens > most:
                raise error
            return measured.forward.hidden(params, rows)

        return measured.forward._replace(hidden=hidden)

    cpu = torch.device("cpu")
    found = choose(measured.params, short(150), 7, 5, 11, cpu)
    assert 12 <= found.max_tokens <= 75
    assert "do not fit" in found.message
    with pytest.raises(InputError, match="whose gradient takes more; "):
        choose(measured.params, short(5), 7, 5, 11, cpu)
    broken = measured.forward._replace(hidden=lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        choose(measured.params, broken, 7, 5, 11, cpu)


@pytest.mark.skipif(not memory.reset_peaks(), reason="/proc/self/clear_refs cannot be written here")
def test_a_run_sizes_its_microbatches_and_writes_the_number(
    ran, command, checkpoint, monkeypatch
) -> None:
    document, outcome = ran(run__max_tokens="auto")
    config = read_config(Path("runs/one/config.toml"))
    assert config.run.max_tokens == document["conventions"]["max_tokens"] == 4096  # a tiny policy
    assert "run.max_tokens = 4096 (auto): " in outcome.err
    same, _ = ran(run__max_tokens=4096)
    assert same["cost"]["total"]["results_computed"] == 0  # the number is the key
    monkeypatch.setattr(memory, "free", lambda _: 2**20)
    peaks = iter([11 * 2**40, 21 * 2**40])  # a TiB at rest, and 10 for the first trial
    monkeypatch.setattr(memory, "process_peak", lambda: next(peaks))
    given = checkpoint.settings() | {"run.max_tokens": "auto", "run.name": "two"}
    outcome = command("run", "c.toml", *sets(given))
    assert outcome.status == 2
    assert 'run.max_tokens = "auto": the longest sequence may have 11 tokens' in outcome.err
    assert not Path("runs/two").exists()


@pytest.mark.parametrize("value", ["0", "big", "2.5", "true"])
def test_sizes_that_are_none(tmp_path, value) -> None:
    path = tmp_path / "c.toml"
    path.touch()
    with pytest.raises(InputError, match=r'run.max_tokens: a whole number of at least 1, or "auto"'):
        read_config(path, [f"run.max_tokens={value}"])
