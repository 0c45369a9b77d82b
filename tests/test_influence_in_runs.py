"""The influence of U's prompts on E's in a run: what it writes and prints, and what it costs."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import funcprobe
from funcprobe.adapters import run
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.results import load
from funcprobe.adapters.results.influence_words import influence_lines
from funcprobe.adapters.results.tables import print_results
from funcprobe.adapters.stages.influence import influences as stage_influences
from support.checkpoints import sets

ETAS = {"measure.etas": [1e-6], "measure.second_order": "none"}


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """Runs in one place, whose stages they share."""
    place = tmp_path_factory.mktemp("runs")
    (place / "c.toml").touch()

    def call(name: str, **changes: Any) -> Path:
        given = checkpoint.settings() | ETAS | {"run.folder": str(place), "run.name": name}
        given |= {key.replace("__", "."): value for key, value in changes.items()}
        return run.run(read_config(place / "c.toml", sets(given)[1::2]), Narrator())[1]

    return call


@pytest.fixture(scope="module")
def two(made) -> Path:
    return made("two", attribution__influence=2)


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_shares_are_those_of_the_attribution_with_an_error_of_their_own(two):
    found = document(two)
    section, listed = found["influence"], found["attribution"]["U_prompts"]
    assert len(section["prompts"]) == 2
    for prompt, other in zip(section["prompts"], listed, strict=False):
        assert (prompt["prompt_index"], prompt["text"]) == (other["prompt_index"], other["text"])
        assert prompt["share"]["share"] == pytest.approx(other["share"], rel=1e-9)
        assert 0 < prompt["share"]["se"] < 100 * abs(prompt["share"]["share"])
        low, high = (prompt["share"]["interval"][bound] for bound in ("low", "high"))
        assert low < prompt["share"]["share"] < high
        sizes = [abs(module["share"]) for module in prompt["modules"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) <= 10
    pairs = section["pairs"]
    assert len(pairs) == 10
    sizes = [abs(pair["influence"]) for pair in pairs]
    assert sizes == sorted(sizes, reverse=True)
    assert {pair["U_prompt"] for pair in pairs} <= {p["prompt_index"] for p in section["prompts"]}


def test_prompts_one_by_one_are_those_of_one_call(made, monkeypatch):
    seen = []

    def kept(found, *given):
        seen.append((found, stage_influences(found, *given)))
        return seen[-1][1]

    monkeypatch.setattr(run, "influences", kept)
    made("one-by-one", attribution__influence=3)
    ((found, apart),) = seen
    plan, batches = found.plan, found.batches
    at_once = funcprobe.influence(
        plan.policy.params,
        found.passes,
        batches.eval_batch,
        batches.update,
        plan.adam_state,
        plan.forward,
        columns=apart.column_M.tolist(),
        route="columns",
        entropy=plan.entropy,
        step=plan.step,
        max_tokens=plan.max_tokens,
        unit_N=found.unit_N,
    )
    assert at_once.pair_NM.shape[1] == 3
    # A prompt's gradient is cut into the same microbatches: float64, some additions in another order.
    torch.testing.assert_close(apart.pair_NM, at_once.pair_NM, rtol=1e-12, atol=1e-15)
    assert torch.equal(apart.row_N, at_once.row_N)
    for one, other in zip(apart.share_M, at_once.share_M, strict=True):
        assert one.derivative == pytest.approx(other.derivative, rel=1e-12)
        assert one.se == pytest.approx(other.se, rel=1e-12)
        torch.testing.assert_close(one.influence_N, other.influence_N, rtol=1e-12, atol=1e-15)
    for one, other in zip(apart.tensor_M, at_once.tensor_M, strict=True):
        assert one == pytest.approx(other, rel=1e-10, abs=1e-15)


def test_each_prompt_costs_a_pass_over_E_and_over_its_own_responses(two, made):
    cost = {s["stage"]: s["passes"] for s in document(two)["cost"]["stages"]}
    prompts = document(two)["counts"]["U_prompts"]
    assert cost["influence"] == {"E": 2.0, "U": pytest.approx(2 / prompts)}
    again = made("again", attribution__influence=2)
    assert document(again)["influence"] == document(two)["influence"]
    stage = next(s for s in document(again)["cost"]["stages"] if s["stage"] == "influence")
    assert (stage["results_computed"], stage["results_reused"], stage["passes"]) == (0, 2, {})


def test_it_prints_every_prompt_and_every_pair(two):
    results = load(two)
    lines = influence_lines(results)
    assert len(lines) == 2 + 1 + 10
    for line, prompt in zip(lines, results.influence.prompts, strict=False):
        assert line.startswith(f"Prompt {prompt.prompt_index} of U ({prompt.text}) makes ")
        assert f"{results.next_lr.value * prompt.share.share:+.1e} ± " in line
        assert ("indistinguishable" in line) == prompt.share.indistinguishable_from_0
    hostile = results.influence.pairs[0].model_copy(update={"E_text": "'[red]\\x1b[2J'"})
    section = results.influence.model_copy(update={"pairs": (hostile,)})
    out = io.StringIO()
    print_results(
        results.model_copy(update={"influence": section}), Console(file=out, width=300), verbose=True
    )
    assert f"on {hostile.E_prompt} ('[red]\\x1b[2J'): " in out.getvalue()
    per_unit = results.model_copy(update={"next_lr": results.next_lr.model_copy(update={"value": 0.0})})
    assert "per unit of learning rate" in influence_lines(per_unit)[0]


@pytest.mark.slow
def test_none_is_the_default_and_more_than_there_are_is_all(made):
    assert document(made("none"))["influence"] is None
    every = document(made("every", attribution__influence=1000))
    assert 2 < len(every["influence"]["prompts"]) <= every["counts"]["U_prompts"]
    total = sum(prompt["share"]["share"] for prompt in every["influence"]["prompts"])
    size = sum(abs(prompt["share"]["share"]) for prompt in every["influence"]["prompts"])
    assert total == pytest.approx(every["attribution"]["update"]["share"], abs=1e-9 * size)


def test_without_shares_it_is_rejected(made):
    with pytest.raises(funcprobe.InputError, match='set level to "tokens", or influence to 0') as error:
        made("off", attribution__influence=1, attribution__level="off")
    assert "\n" not in str(error.value)
    with pytest.raises(funcprobe.InputError, match="influence"):
        made("negative", attribution__influence=-1)
