"""What a run costs is counted; microbatches size themselves; the baseline is fitted once."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_batch, random_like, sets, tiny_policy

import funcprobe
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.machine import cost, memory
from funcprobe.adapters.machine.cost import Cost, Stage
from funcprobe.adapters.stages import max_tokens, plan
from funcprobe.adapters.stages.max_tokens import Trial, choose, fitted
from funcprobe.statistics import baselines
from funcprobe.types import InputError


def stage() -> Stage:
    return Stage(Cost("one"), lambda _: None)


def read_tokens(model: torch.nn.Module) -> Counter:
    """Counts, by a hook of the model's own, the tokens that its embedding reads."""
    seen: Counter = Counter()

    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen["tokens"] += args[0].numel()

    model.get_input_embeddings().register_forward_pre_hook(hook)
    return seen


# Passes and tokens


def test_every_primitive_is_one_pass_and_its_tokens_are_those_the_embedding_reads() -> None:
    model = tiny_policy()
    probe = funcprobe.bind(model)
    # Prompts of several lengths, some with several responses.
    batch = random_batch([(i // 3, 2 + i // 3, 1 + (5 * i) % 7) for i in range(14)])
    v, ones_NR = random_like(probe.params), funcprobe.response_mask(batch).double()
    seen = read_tokens(model)
    passes = {
        "token_stats": lambda *last: funcprobe.token_stats(probe.params, batch, *last),
        "weighted_grad": lambda *last: funcprobe.weighted_grad(
            probe.params, batch, ones_NR, ones_NR, *last
        ),
        "tangents": lambda *last: funcprobe.tangents(probe.params, batch, v, *last),
        "alpha_vjp": lambda *last: funcprobe.alpha_vjp(probe.params, batch, v, *last),
    }
    for most in (12, 40):
        for name, compute in passes.items():
            seen.clear()
            one = stage()
            compute(cost.counted(probe.forward, one, "E"), most)
            assert one.cost.sequences == {"E": 14}, (name, most)
            assert one.cost.tokens == seen["tokens"] > 0, (name, most)
            # Without sharing every token but the last of each response is read.
            unshared = int((batch.prompt_length_N + batch.response_length_N - 1).sum())
            assert 0 < one.cost.tokens - one.cost.padding <= unshared


def test_padding_is_what_the_embedding_reads_beyond_the_sequences() -> None:
    model = tiny_policy()
    probe = funcprobe.bind(model)
    plain = probe.forward._replace(layout="plain")
    batch = random_batch([(0, 3, 6), (1, 2, 1), (2, 4, 2)])
    seen, one = read_tokens(model), stage()
    funcprobe.token_stats(probe.params, batch, cost.counted(plain, one, "E"), 64)
    assert seen["tokens"] == one.cost.tokens == 3 * 8
    assert one.cost.padding == (8 - 8) + (8 - 2) + (8 - 5)


@pytest.fixture
def ran(checkpoint, command):
    """results.json of a run with changed settings, and what it printed."""

    def call(*flags, **changes):
        given = checkpoint.settings() | {"run.name": "one", "measure.next_lr": False}
        given |= {"sampling.B_E": 40} | {k.replace("__", "."): v for k, v in changes.items()}
        Path("c.toml").touch()
        outcome = command("run", "c.toml", *sets(given), *flags)
        assert outcome.status == 0, outcome.err
        return json.loads(Path("runs/one/results.json").read_text()), outcome

    return call


def by_stage(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in document["cost"]["stages"]}


def test_a_run_says_what_each_stage_took(ran) -> None:
    document, outcome = ran(measure__etas=[1e-5, 1e-4])
    found, total = by_stage(document), document["cost"]["total"]
    assert list(found)[-5:] == ["sample U", "rewards of U", "first order", "measure", "sanity checks"]
    assert found["first order"]["passes"] == {"E": 2, "U": 2}  # along v, X; Y, along P X
    assert found["measure"]["passes"] == {"E": 2 + 4 + 2}  # etas, rounding, second derivative
    # 32 of the 40 four times (statistics, without adapter, eta = 0, again), and alpha on four:
    # a gradient of each and three contractions.
    assert found["sanity checks"]["passes"] == {"E": (4 * 32 + 4 + 3 * 4) / 40}
    assert found["sample E"]["generation_tokens"] > 40 * 4
    assert found["sample E"]["tokens"] == 0
    for row in found.values():
        assert row["seconds"] >= 0
        assert row["process_peak_bytes"] > 100 * 2**20  # torch alone
        assert row["device_peak_bytes"] is None
        assert row["results_reused"] == 0
    for key in ("seconds", "tokens", "generation_tokens", "results_computed"):
        assert total[key] == pytest.approx(sum(row[key] for row in found.values()), abs=0.01)
    assert set(found["measure"]) - {"stage", "process_peak_of"} <= {
        *document["cost"]["units"],
        "results_computed",
    }
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("cost: ")]
    assert re.fullmatch(
        r"cost: \d+ s, 13\.6 passes over E, 2 over U, [\d.]+ k tokens, padding [\d.]+%, "
        rf"peak [\d.]+ GiB \({total['highest_peak']}\)",
        line,
    )


def test_what_an_earlier_run_made_costs_no_pass(ran, monkeypatch) -> None:
    """Nor a fit of the baseline, which one run makes once."""
    fitted_to: list[int] = []
    fit = baselines.baseline

    def counting(kind: Any, batch: funcprobe.Batch, *args: Any) -> torch.Tensor:
        fitted_to.append(len(batch.prompt_N))
        return fit(kind, batch, *args)

    monkeypatch.setattr(baselines, "baseline", counting)
    first, _ = ran(measure__etas=[1e-5])
    assert first["conventions"]["entropy"]["baseline"] == "ridge"
    assert fitted_to.count(40) == 1  # the check of eta = 0 fits that of its 32 sequences
    document, outcome = ran(measure__etas=[1e-5, 1e-4])
    found = by_stage(document)
    for name in ("sample E", "sample U", "first order"):
        row = found[name]
        assert (row["results_computed"], row["results_reused"]) == (0, 1)
        assert (row["passes"], row["tokens"], row["generation_tokens"]) == ({}, 0, 0)
        assert by_stage(first)[name]["results_computed"] == 1
    assert (found["measure"]["results_computed"], found["measure"]["results_reused"]) == (1, 7)
    assert found["measure"]["passes"] == {"E": 1}
    assert "10 of 11 results from earlier runs" in outcome.out
    assert "first order: " in (log := Path("runs/one/run.log").read_text())
    assert "measure: " in log
    assert "(7 of 8 from runs/.stages)" in log
    assert fitted_to.count(40) == 1
    again, _ = ran("--fresh", measure__etas=[1e-5, 1e-4])
    assert fitted_to.count(40) == 2
    assert again["cost"]["total"]["results_reused"] == 0
    assert {k: v for k, v in again.items() if k != "cost"} == {
        k: v for k, v in document.items() if k != "cost"
    }


def test_responses_sampled_anew_and_the_exact_second_order_are_stages(ran) -> None:
    document, outcome = ran(measure__etas=[30.0], measure__resample=True, measure__second_order="exact")
    found = by_stage(document)
    assert found["sample E at eta 30"]["passes"] == {"fresh": 1}
    assert found["sample E at eta 30"]["generation_tokens"] > 0
    assert found["second order"]["passes"]["E"] == pytest.approx(
        1, abs=0.15
    )  # and its check: four of 8 tokens
    assert " 1 over fresh" in outcome.out


# Memory


def resettable() -> bool:
    return memory.reset_peaks()


@pytest.mark.skipif(not resettable(), reason="/proc/self/clear_refs cannot be written here")
def test_the_peak_is_the_stages_own() -> None:
    narrator = Narrator()
    size = 256 * 2**20
    with narrator.phase("large"):
        before = memory.process_now()
        torch.ones(size, dtype=torch.uint8)
    with narrator.phase("small"):
        pass
    large, small = narrator.costs["large"], narrator.costs["small"]
    assert large.peak_of_stage
    # Other threads hold and free a few MiB meanwhile.
    assert large.process_peak - before == pytest.approx(size, rel=0.1)
    assert large.process_peak - small.process_peak == pytest.approx(size, rel=0.1)


def test_where_the_peak_cannot_be_reset_it_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    narrator = Narrator()
    with narrator.phase("one"):
        pass
    (row,) = cost.document(narrator.costs.values(), {})["stages"]
    assert row["process_peak_of"] == "the process since its start"
    assert row["process_peak_bytes"] >= memory.process_now() // 2
    with pytest.raises(InputError, match="to measure the memory of a microbatch: give a number"):
        max_tokens._peak_above(torch.device("cpu"))


def test_free_memory_is_what_the_containers_limit_leaves(tmp_path, monkeypatch) -> None:
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(memory, "CGROUPS", ((str(limit), str(used)),))
    cpu = torch.device("cpu")
    whole = memory.free(cpu)
    assert whole > 2**24
    limit.write_text("max\n")
    used.write_text("5000\n")
    assert memory.free(cpu) == pytest.approx(whole, rel=0.5)
    limit.write_text("15000\n")
    assert memory.free(cpu) == 10_000
    # Files that were read are given up where memory is needed; cgroup v1 has its own alone, and all.
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\nactive_file 1000\n")
    assert memory.free(cpu) == 13_000
    (tmp_path / "memory.stat").write_text("inactive_file 3000\ntotal_inactive_file 4000\n")
    assert memory.free(cpu) == 14_000


def test_the_line_for_the_reader_has_the_gpus_peak() -> None:
    gib = 2**30
    costs = [
        Cost("load", 2.0, process_peak=3 * gib, device_peak=gib),
        Cost(
            "first order", 40.0, Counter(E=20, U=8), 3_000_000, 30_000, 0, 0, 2, 0, gib, True, 5 * gib
        ),
        Cost("measure", 18.0, Counter(E=30), 1_000_000, 0, 0, 0, 3, 1, gib, True, 4 * gib),
    ]
    document = cost.document(costs, {"E": 10, "U": 8, "fresh": 10})
    assert cost.summary(document) == (
        "cost: 60 s, 5 passes over E, 1 over U, 4.0 M tokens, padding 0.8%, "
        "peak 3 GiB and, on the GPU, 5 GiB (first order), 1 of 6 results from earlier runs"
    )
    nothing = cost.document([Cost("load", process_peak=gib)], {})
    assert cost.summary(nothing) == "cost: 0 s, no pass, 0 tokens, peak 1 GiB (load)"


def test_halved_microbatches_are_said_once_each(checkpoint) -> None:
    Path("c.toml")
    narrator = Narrator()
    config = read_config(
        Path(__file__).parents[1] / "configs/quickstart.toml", sets(checkpoint.settings())[1::2]
    )
    forward = plan.load(config, narrator).forward
    for size in (1024, 1024, 512):
        forward.halved(size)
    said = [line for line in narrator.lines if line.startswith("out of memory")]
    assert said == [
        f"out of memory: microbatches of at most {size} tokens in the rest of this pass"
        for size in ("1,024", "512")
    ]


def test_a_run_goes_on_in_halves_where_memory_runs_out(ran, monkeypatch) -> None:
    """A device that holds 100 tokens: the same numbers, and the lines that say why it took longer."""
    whole, _ = ran()
    bind = funcprobe.bind

    def small_device(*args: Any, **kwargs: Any) -> funcprobe.Probe:
        probe = bind(*args, **kwargs)

        def hidden(params: funcprobe.Params, rows: Any) -> torch.Tensor:
            if rows.tokens > 100:
                raise torch.OutOfMemoryError("CUDA out of memory")
            out: torch.Tensor = probe.forward.hidden(params, rows)
            return out

        return probe._replace(forward=probe.forward._replace(hidden=hidden))

    monkeypatch.setattr(funcprobe, "bind", small_device)
    halved, outcome = ran("--fresh")
    assert "out of memory: microbatches of at most" in outcome.err
    assert by_stage(halved)["first order"]["passes"] == {"E": 2, "U": 2}
    for part in ("derivative", "bars_dot", "se_over_U"):
        value = whole["first_order"][part]["value"]
        assert halved["first_order"][part]["value"] == pytest.approx(value, rel=1e-9)


# The size of a microbatch


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


@pytest.mark.skipif(not resettable(), reason="/proc/self/clear_refs cannot be written here")
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
