"""What a run costs is counted: passes, tokens, results from earlier runs, halved microbatches."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.machine import cost
from funcprobe.adapters.machine.cost import Cost, Stage
from funcprobe.adapters.results.cost import cost_line, cost_section
from funcprobe.adapters.stages import checks, plan
from funcprobe.statistics import baselines
from funcprobe.types import InputError
from support.checkpoints import sets
from support.paths import ROOT
from support.policies import random_batch, random_like, tiny_policy


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


@pytest.mark.slow
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
def ran(ran):
    """With a batch E of more than one microbatch."""
    return partial(ran, **{"sampling.B_E": 40})


def by_stage(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in document["cost"]["stages"]}


def test_a_run_says_what_each_stage_took(ran) -> None:
    document, outcome = ran("-v", measure__etas=[1e-5, 1e-4])
    found, total = by_stage(document), document["cost"]["total"]
    assert list(found)[-7:] == [
        *("rewards of U", "gradient on U", "first order", "rewards of E", "attribution", "measure"),
        "sanity checks",
    ]
    assert found["gradient on U"]["passes"] == {"U": 1}
    assert found["first order"]["passes"] == {"E": 2, "U": 2}  # along v, X; along P X, clipped Y
    assert found["attribution"]["passes"] == {"U": 1}  # the marginals' tangents
    assert found["measure"]["passes"] == {"E": 2 + 4 + 2}  # etas, rounding, second derivative
    # 32 of the 40 three times (statistics, without adapter, eta = 0); alpha on four: a gradient of each
    # and three contractions; four twice, to compare.
    assert found["sanity checks"]["passes"] == {"E": (3 * 32 + 4 + 3 * 4 + 2 * 4) / 40}
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
        r"cost: \d+ s, 13 passes over E, 4 over U, [\d.]+ k tokens, padding [\d.]+%, "
        rf"peak memory [\d.]+ GiB \({total['highest_peak']}\)",
        line,
    )


@pytest.mark.slow
def test_what_an_earlier_run_made_costs_no_pass(ran, monkeypatch) -> None:
    """Nor a fit of the baseline, which one run makes once."""
    fitted_to: list[int] = []
    fit = baselines.baseline

    def counting(kind: Any, batch: funcprobe.Batch, *args: Any, **given: Any) -> torch.Tensor:
        if not given:  # an observable's has the prefix's statistics beside its own
            fitted_to.append(len(batch.prompt_N))
        return fit(kind, batch, *args, **given)

    monkeypatch.setattr(baselines, "baseline", counting)
    first, _ = ran(measure__etas=[1e-5])
    assert first["conventions"]["entropy"]["baseline"] == "ridge"
    assert fitted_to.count(40) == 1  # the check of eta = 0 fits that of its 32 sequences
    document, outcome = ran("-v", measure__etas=[1e-5, 1e-4])
    found = by_stage(document)
    reused = ("sample E", "sample U", "gradient on U", "first order", "attribution")
    for name in reused:
        row = found[name]
        assert (row["results_computed"], row["results_reused"]) == (0, 1)
        assert (row["passes"], row["tokens"], row["generation_tokens"]) == ({}, 0, 0)
        assert by_stage(first)[name]["results_computed"] == 1
    assert (found["measure"]["results_computed"], found["measure"]["results_reused"]) == (1, 4)
    assert found["measure"]["passes"] == {"E": 1}
    row = found["sanity checks"]
    assert (row["results_computed"], row["results_reused"]) == (0, 1)
    assert row["passes"] == {"E": 2 * 4 / 40}  # whether this process repeats a forward
    assert [row["saw"] for row in document["checks"]] == [row["saw"] for row in first["checks"]]
    assert "10 of 11 results from earlier runs" in outcome.flat
    assert "first order: " in (log := Path("runs/one/run.log").read_text())
    assert "measure: " in log
    assert "(4 of 5 from runs/.stages)" in log
    assert fitted_to.count(40) == 1
    again, _ = ran("--fresh", measure__etas=[1e-5, 1e-4])
    assert fitted_to.count(40) == 2
    assert again["cost"]["total"]["results_reused"] == 0
    assert {k: v for k, v in again.items() if k != "cost"} == {
        k: v for k, v in document.items() if k != "cost"
    }


def test_a_file_without_checks_is_rejected(tmp_path) -> None:
    path = tmp_path / "checks-0.json"
    for text in ('[[{"name": "a", "passed": tr', '[[{"name": "a", "failed": false}]]', "[1]"):
        path.write_text(text)
        with pytest.raises(InputError, match="no checks"):
            checks.stored_checks(path)


@pytest.mark.slow
def test_responses_sampled_anew_and_the_exact_second_order_are_stages(ran) -> None:
    given = {"measure__resample": True, "measure__second_order": "exact"}
    document, outcome = ran("-v", measure__etas=[30.0], **given)
    found = by_stage(document)
    assert found["sample E at eta 30"]["passes"] == {"fresh": 1}
    assert found["sample E at eta 30"]["generation_tokens"] > 0
    assert found["second order"]["passes"]["E"] == pytest.approx(
        1, abs=0.15
    )  # and its check: four of 8 tokens
    assert " 1 over fresh" in outcome.flat


def test_the_line_for_the_reader_has_the_gpus_peak() -> None:
    gib = 2**30
    costs = [
        Cost("load", 2.0, process_peak=3 * gib, device_peak=gib),
        Cost(
            "first order", 40.0, Counter(E=20, U=8), 3_000_000, 30_000, 0, 0, 2, 0, gib, True, 5 * gib
        ),
        Cost("measure", 18.0, Counter(E=30), 1_000_000, 0, 0, 0, 3, 1, gib, True, 4 * gib),
    ]
    found = cost_section(costs, {"E": 10, "U": 8, "fresh": 10})
    assert cost_line(found) == (
        "cost: 60 s, 5 passes over E, 1 over U, 4.0 M tokens, padding 0.8%, "
        "peak memory 3 GiB and, on the GPU, 5 GiB (first order), 1 of 6 results from earlier runs"
    )
    nothing = cost_section([Cost("load", process_peak=gib)], {})
    assert cost_line(nothing) == "cost: 0 s, no pass, 0 tokens, peak memory 1 GiB (load)"


def test_halved_microbatches_are_said_once_each(checkpoint) -> None:
    Path("c.toml")
    narrator = Narrator()
    config = read_config(ROOT / "configs/quickstart.toml", sets(checkpoint.settings())[1::2])
    forward = plan.load(config, narrator).forward
    for size in (1024, 1024, 512):
        forward.halved(size)
    said = [line for line in narrator.lines if line.startswith("out of memory")]
    assert said == [
        f"out of memory: microbatches of at most {size} tokens in the rest of this pass"
        for size in ("1,024", "512")
    ]


@pytest.mark.slow
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
