"""The size of a microbatch, by trials, on machines whose memory follows a formula."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.machine import memory
from funcprobe.adapters.machine.ranks import World
from funcprobe.adapters.stages import max_tokens
from funcprobe.adapters.stages.max_tokens import FIRST, MOST, Passes, choose
from funcprobe.adapters.stages.microbatch import Size, resolve
from funcprobe.adapters.stages.peaks import Curve, Trial, at_most, curve
from funcprobe.adapters.store import Stages
from funcprobe.types import InputError
from support.checkpoints import sets
from support.policies import tiny_policy

CPU = torch.device("cpu")
KIB, MIB, GIB = 2**10, 2**20, 2**30


class Machine:
    """Every gradient takes fixed + a_token T + a_pair T L bytes, for T tokens, L in a sequence.

    If it is recomputed, `recomputed` times as much. Above `short_of` memory runs out.
    """

    def __init__(self, *formula: float, recomputed: float = 1.0, short_of: float = 1e30) -> None:
        self.fixed, self.a_token, self.a_pair = formula
        self.recomputed, self.short_of = recomputed, short_of
        self.taken: list[float] = []
        self.since = 0.0

    def takes(self, tokens: float, length: float) -> float:
        return self.fixed + self.a_token * tokens + self.a_pair * tokens * min(tokens, length)

    def gradient(
        self, params: Any, batch: funcprobe.Batch, p: Any, q: Any, forward: Any, size: int
    ) -> None:
        length_N = batch.prompt_length_N + batch.response_length_N
        assert int(length_N.sum()) <= size
        bytes_ = self.takes(int(length_N.sum()), int(length_N.max()))
        bytes_ *= self.recomputed if forward.recompute else 1.0
        if bytes_ > self.short_of:
            raise torch.OutOfMemoryError("x")
        self.taken.append(bytes_)
        self.since = bytes_

    def meter(self, _: torch.device) -> Callable[[], float]:
        def peak() -> float:
            found, self.since = self.since, 0.0
            return found

        return peak

    def choose(self, prompt: int, response: int, room: float, device: str = "cpu") -> Any:
        forward = PROBE.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(funcprobe, "weighted_grad", self.gradient)
            patch.setattr(memory, "peak_meter", self.meter)
            patch.setattr(memory, "can_measure", lambda _: True)
            passes = Passes(PROBE.params, forward, prompt, response, 11, (torch.device(device),))
            return CHOOSE(passes, room)


CHOOSE = choose  # also where a test replaces it
PROBE = funcprobe.bind(tiny_policy())


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    fixed=st.floats(0, 1e10),
    a_token=st.floats(1e4, 5e7),
    a_pair=st.floats(0, 1e4),
    prompt=st.integers(1, 300),
    response=st.integers(1, 3000),
    room=st.floats(4e9, 1e12),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_no_trial_takes_more_than_half_and_the_choice_is_the_largest(
    fixed, a_token, a_pair, prompt, response, room, device
):
    machine, longest = Machine(fixed, a_token, a_pair), prompt + response
    powers = [2**i for i in range(16) if 2**i <= MOST[device]]
    first = machine.takes(1.5 * FIRST, 1.5 * FIRST)  # of which nothing is known beforehand
    fits = {
        margin: max([n for n in powers if margin * machine.takes(n, longest) <= room / 2], default=1)
        for margin in (0.75, 1.25)
    }
    try:
        found = machine.choose(prompt, response, room, device)
    except InputError:
        assert machine.takes(longest, longest) > 0.75 * room or first > room / 2
        assert all(taken <= max(first, room / 2) for taken in machine.taken)
        return
    assert all(taken <= max(first, room / 2) for taken in machine.taken)
    assert found.max_tokens == longest or found.max_tokens in powers
    assert found.max_tokens >= longest
    if 16 * first <= room / 2:  # so that there is more than one trial
        assert fits[1.25] <= found.max_tokens <= max(longest, fits[0.75])


def test_short_trials_suffice_where_memory_is_plenty():
    """On a CPU 16 + 32 + 64 + 128 + 256 tokens; for one long sequence up to a quarter of it."""
    machine = Machine(0, 3 * MIB, 0)
    assert machine.choose(50, 250, 100 * GIB).max_tokens == 4096
    assert sum(machine.taken) / (3 * MIB) <= 16 + 32 + 64 + 128 + 256
    machine = Machine(0, 3 * MIB, 300)
    assert machine.choose(200, 15_800, 1000 * GIB).max_tokens == 16_000
    assert machine.taken[-1] <= machine.takes(4096, 16_000)


def test_the_same_size_where_the_free_memory_is_nearly_the_same():
    sizes = {Machine(1e6, 1e6, 0).choose(50, 50, room * 1e9).max_tokens for room in (4.2, 4.9, 5.6, 8)}
    assert sizes == {2048}


def test_a_gradient_is_recomputed_where_one_sequence_would_not_fit():
    """1 MiB a token, 16,000 tokens: 15.6 GiB; recomputed a twentieth of that."""
    machine = Machine(0, MIB, 0, recomputed=0.05)
    assert not machine.choose(1000, 15_000, 24 * GIB).recompute
    found = machine.choose(1000, 15_000, 20 * GIB)
    assert found.recompute
    assert found.max_tokens == 16_000
    assert "51 KiB a token, 20.0 GiB free, and gradients recompute layer by layer" in found.message
    # Most of a microbatch's memory is free again, which larger ones use, up to half.
    assert machine.choose(100, 1900, 2.3 * GIB).max_tokens == 4096
    with pytest.raises(
        InputError, match=r"16000 tokens.* takes 8\d\d MiB, recomputed layer by layer; 768 MiB are"
    ):
        machine.choose(1000, 15_000, 0.75 * GIB)


@pytest.mark.parametrize(("given", "said"), [(None, True), ("1", False)])
def test_what_takes_less_memory_is_said_where_it_is_short(monkeypatch, given, said):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if given is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given)
    machine = Machine(0, MIB, 0, recomputed=0.05)
    advice = "; THP_MEM_ALLOC_ENABLE=1 in the environment takes less memory"
    assert machine.choose(1000, 15_000, 20 * GIB).message.endswith(advice) == said
    with pytest.raises(InputError) as raised:
        machine.choose(1000, 15_000, 0.75 * GIB)
    assert str(raised.value).endswith(advice) == said
    assert advice not in machine.choose(1000, 15_000, 100 * GIB).message


def test_where_memory_runs_out_on_a_trial():
    """What is known by then counts; if nothing is known, recomputing; if that fails as well, a line."""
    machine = Machine(0, MIB, 0, short_of=100 * MIB)
    assert machine.choose(7, 5, 2 * GIB).max_tokens == 1024
    machine = Machine(0, MIB, 0, recomputed=0.1, short_of=10 * MIB)
    assert machine.choose(7, 5, GIB).recompute
    with pytest.raises(InputError, match="whose gradient takes more, recomputed"):
        Machine(0, MIB, 0, short_of=5 * MIB).choose(7, 5, GIB)
    machine = Machine(0, MIB, 0, recomputed=0.1, short_of=5 * MIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(funcprobe, "unlayered", lambda *_: "of a reason")
        with pytest.raises(InputError, match=r"cannot be recomputed layer by layer \(of a reason\)"):
            machine.choose(7, 5, GIB)
    broken = Machine(0, MIB, 0)
    broken.takes = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        broken.choose(7, 5, GIB)


def test_a_trial_that_was_recomputed_is_none():
    """As one that was halved: what it took is not what an ordinary gradient takes."""
    machine = Machine(0, MIB, 0, recomputed=0.1, short_of=100 * MIB)
    ordinary = machine.gradient

    def again(params, batch, p, q, forward, size):
        try:
            ordinary(params, batch, p, q, forward, size)
        except torch.OutOfMemoryError:
            forward.recomputing()
            ordinary(params, batch, p, q, forward._replace(recompute=True), size)

    machine.gradient = again
    found = machine.choose(100, 100, 100 * GIB)
    assert found.curve.peak(200) == pytest.approx(200 * MIB, rel=0.01)


def test_a_curve_through_three_peaks_is_the_one_they_are_on():
    of = Curve(5e8, 2e6, 700.0, 1000)
    trials = [Trial(n, of.peak(n)) for n in (64, 128, 256, 512, 2000)]
    found = curve(trials, 1000)
    assert found[:3] == pytest.approx(of[:3], rel=1e-6)
    assert found.peak(8000) == pytest.approx(5e8 + 2e6 * 8000 + 700 * 8000 * 1000, rel=1e-9)
    # Peaks that are linear up to what repetitions differ by are taken to be linear.
    noisy = [Trial(n, 2e6 * n * factor) for n, factor in ((128, 1.02), (256, 0.98), (512, 1.01))]
    assert curve(noisy, 1000).a_pair == 0
    # Peaks that do not grow, as far as the trials see; and that fall.
    assert curve([Trial(128, 5e7), Trial(256, 5e7)], 300).peak(4096) == pytest.approx(5e7)
    assert curve([Trial(128, 6e7), Trial(256, 5e7)], 300).peak(4096) < 7e7
    assert at_most([Trial(64, 5e7)], curve([Trial(64, 5e7)], 300), 128) == 2e8


@pytest.mark.skipif(not memory.reset_peaks(), reason="/proc/self/clear_refs cannot be written here")
def test_a_run_sizes_its_microbatches_and_the_next_one_keeps_the_size(
    ran, command, checkpoint, monkeypatch
):
    # A tiny policy's own peaks are those of the process's noise, at times 0.
    monkeypatch.setattr(memory, "peak_meter", lambda *_: lambda: 1e6)
    document, outcome = ran(run__max_tokens="auto")
    config = read_config(Path("runs/one/config.toml"))
    assert config.run.max_tokens == document["conventions"]["max_tokens"] == 4096  # a tiny policy
    assert "run.max_tokens = 4096 (auto): " in outcome.err
    # The number is in the keys of what is stored, and is kept where half of what is free is less.
    free = memory.free(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(max_tokens, "choose", lambda *_: pytest.fail("a size is stored"))
        patch.setattr(memory, "free", lambda _: free // 2)
        same, outcome = ran(run__max_tokens="auto")
    assert same["cost"]["total"]["results_computed"] == 0
    assert "run.max_tokens = 4096 (auto): an earlier run's size; 0.0 of " in outcome.err
    monkeypatch.setattr(memory, "free", lambda _: 1000)
    given = checkpoint.settings() | {"run.max_tokens": "auto", "run.name": "two"}
    outcome = command("run", "c.toml", *sets(given))
    assert outcome.status == 2
    assert 'run.max_tokens = "auto": the longest sequence may have 11 tokens' in outcome.err
    assert not Path("runs/two").exists()


def test_a_stored_size_is_kept_while_it_fits(tmp_path, monkeypatch):
    """10 MB a token: 1024 tokens take 10.24 GB."""
    config, stages = Config(), Stages(tmp_path)
    made = Machine(0, 1e7, 0)
    passes = Passes(PROBE.params, PROBE.forward, 7, 5, 11, (CPU,))
    monkeypatch.setattr(
        max_tokens, "choose", lambda passes, room: made.choose(*passes[2:4], room, "cpu")
    )

    def size(free: float, stages: Stages = stages, passes: Passes = passes, **policy: str) -> int:
        monkeypatch.setattr(memory, "free", lambda _: free)
        return resolve(config, passes, Narrator(), stages, {"base": "b", **policy}).max_tokens

    assert size(22e9, stages._replace(writes=False)) == 1024
    assert not list(tmp_path.iterdir())
    assert size(22e9) == 1024
    assert size(14e9) == 1024
    assert size(1e12) == 1024
    # Another adapter of these shapes has the same; another base, another longest sequence has not.
    assert size(1e12, adapter="another") == 1024
    assert size(1e12, base="another") == 4096
    assert size(1e12, passes=passes._replace(response_tokens=6)) == 4096
    assert size(1e12, stages._replace(fresh=True)) == 4096
    assert size(22e9, stages._replace(fresh=True)) == 1024
    assert size(13e9) == 512  # three quarters of which are too little
    assert size(22e9) == 512
    for other in ([], {}, [1, False, [1, 2, 3, "x"]], None):  # of another version
        with monkeypatch.context() as patch:
            patch.setattr(Stages, "recall", lambda *_, other=other: other)
            assert size(22e9) == 1024
    for stored in filter(Path.is_file, tmp_path.iterdir()):
        stored.write_bytes(b"broken")
    assert size(22e9) == 1024
    given = config.model_copy(update={"run": config.run.model_copy(update={"max_tokens": 77})})
    assert resolve(given, passes, Narrator(), stages, {}) == Size(77)


def test_the_least_of_several_processes_is_the_one_that_is_kept(tmp_path, monkeypatch):
    """Else the next run would begin with another size, and find none of this one's results."""
    other = Size(256, True, Curve(0.0, 1e7, 0.0, 12))

    class Two(World):
        def gathered(self, value):
            return [value, other] if isinstance(value, Size) else [value]

    passes = Passes(PROBE.params, PROBE.forward, 7, 5, 11, (CPU,))
    choice = max_tokens.Choice(1024, False, Curve(0.0, 1e7, 0.0, 12), "found")
    monkeypatch.setattr(max_tokens, "choose", lambda *_: choice)
    monkeypatch.setattr(memory, "free", lambda _: 22e9)
    narrator = Narrator()
    found = resolve(Config(), passes, narrator, Stages(tmp_path, world=Two()), {})
    assert found == other
    line = "run.max_tokens = 256 (auto): the least of all processes, gradients recomputed"
    assert narrator.lines[-1].startswith(line)
    monkeypatch.setattr(max_tokens, "choose", lambda *_: pytest.fail("a size is stored"))
    assert resolve(Config(), passes, Narrator(), Stages(tmp_path), {}) == other


def test_where_memory_cannot_be_measured_there_is_a_number(command, checkpoint, monkeypatch):
    monkeypatch.setattr(memory, "can_measure", lambda _: False)
    Path("c.toml").touch()
    given = checkpoint.settings() | {"run.max_tokens": "auto"}
    outcome = command("run", "c.toml", "--dry-run", *sets(given))
    assert outcome.status == 0
    assert "run.max_tokens = 2048 (auto): the memory of a pass cannot be measured" in outcome.err
    assert "of memory at its peak" not in outcome.err


@pytest.mark.parametrize("value", ["0", "big", "2.5", "true"])
def test_sizes_that_are_none(tmp_path, value) -> None:
    path = tmp_path / "c.toml"
    path.touch()
    with pytest.raises(InputError, match=r'run.max_tokens: a whole number of at least 1, or "auto"'):
        read_config(path, [f"run.max_tokens={value}"])
