"""What a run does with the evidence of the gradient on U on a state without names."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import funcprobe
from funcprobe.adapters.checkpoint.toy import ensure_toy
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.machine.ranks import World
from funcprobe.adapters.stages.gradient import gradients_on_U, verify_state
from funcprobe.adapters.stages.loss import update_statistics
from funcprobe.adapters.stages.plan import Plan
from funcprobe.adapters.stages.sweep import state_inputs
from funcprobe.types import InputError, Step
from support.checkpoints import sets

FOUND = {
    "alike": 9,
    "home": 7,
    "margin": {},
    "assigned": {"a": "b", "b": "a", "c": "c"},
    "over_random": 0.0,
    "over": {"the layers reversed": 0.0},
    "over_assigned": 0.0,
}


def verify(
    monkeypatch, verdict: str, *, accept=False, positional=True, rule="adamw", **found: Any
) -> tuple[Any, list[str]]:
    said: list[str] = []
    evidence = funcprobe.Evidence(verdict, **FOUND | {"likeliest": None} | found)
    monkeypatch.setattr(funcprobe, "state_evidence", lambda *_: evidence)
    report = SimpleNamespace(
        positional=positional, twins=9, path="ck/optimizer.pt", route="by position, one group"
    )
    plan: Any = SimpleNamespace(
        optimizer=report,
        step=Step(rule),
        adam_state=None,
        config=SimpleNamespace(optimizer=SimpleNamespace(accept_positional=accept)),
    )
    narrator: Any = SimpleNamespace(say=said.append)
    return verify_state(plan, {}, narrator), said


def test_confirmed_order_is_said(monkeypatch) -> None:
    found, said = verify(monkeypatch, "confirmed")
    assert found.verdict == "confirmed"
    (line,) = said
    assert line.startswith("optimizer state confirmed by the gradients: 7 of 9 ")


@pytest.mark.parametrize("accept", [False, True])
def test_contradicted_order_is_refused(monkeypatch, accept) -> None:
    with pytest.raises(InputError) as caught:
        verify(monkeypatch, "contradicted", accept=accept, likeliest="the layers reversed")
    assert str(caught.value) == (
        "ck/optimizer.pt: names are by position, one group, but by the gradients on U another order "
        "(the layers reversed) is more than 1000 times as likely: 7 of 9 of equal shape fit their own "
        "moments best; the gradient of a fits the state filed under b; save names with "
        "ParamNamesCallback, or give the state of this adapter"
    )


def test_open_order_needs_to_be_accepted(monkeypatch) -> None:
    with pytest.raises(InputError, match=r"neither confirm nor contradict: .*accept_positional = true"):
        verify(monkeypatch, "undecided")
    _, said = verify(monkeypatch, "undecided", accept=True)
    assert said[0].startswith("warning: the gradients do not confirm the optimizer state's order")


def test_names_that_are_certain_are_not_refused(monkeypatch) -> None:
    """The check among the sanity checks says it."""
    for verdict in ("confirmed", "contradicted", "undecided"):
        found, said = verify(monkeypatch, verdict, positional=False)
        assert (found.verdict, said) == (verdict, [])


def test_a_rule_without_second_moments_needs_none(monkeypatch) -> None:
    assert verify(monkeypatch, "contradicted", rule="sgd") == (None, [])


@pytest.mark.slow
def test_a_checkpoint_without_names(command, tmp_path) -> None:
    """As a trainer writes it: goes on without a flag; with two modules exchanged it is refused."""
    toy, plain = ensure_toy(), tmp_path / "checkpoint-20"
    shutil.copytree(toy.checkpoint, plain)
    names = json.loads((plain / "optimizer_param_names.json").read_text())["groups"][0]["names"]
    (plain / "optimizer_param_names.json").unlink()
    Path("c.toml").touch()
    given = {
        "policy.checkpoint": str(plain),
        "prompts.source": str(toy.prompts),
        "sampling.max_new_tokens": 16,
        "optimizer.max_grad_norm": 1.0,
    }
    outcome = command("check", "c.toml", *sets(given))
    assert outcome.status == 0
    assert "optimizer state confirmed by the gradients: " in outcome.err
    saved = torch.load(plain / "optimizer.pt", weights_only=True)
    exchange = {"k_proj": "v_proj", "v_proj": "k_proj"}

    def other(name: str) -> str:
        return next((name.replace(a, b) for a, b in exchange.items() if a in name), name)

    saved["state"] = {names.index(other(names[i])): entry for i, entry in saved["state"].items()}
    torch.save(saved, plain / "optimizer.pt")
    for accept in (False, True):
        outcome = command("check", "c.toml", *sets(given | {"optimizer.accept_positional": accept}))
        assert outcome.status == 2
        assert "another order (k_proj and v_proj exchanged)" in outcome.err


def test_what_is_stored_says_how_many_processes_cut_it() -> None:
    """For one number of processes results are bit-identical; another rounds its sums otherwise."""

    def keys(size: int) -> list[Any]:
        asked: list[Any] = []
        world = World(0, size)
        plan: Any = SimpleNamespace(
            inputs={"policy": {}},
            policy=SimpleNamespace(params={}),
            temperature=1.0,
            max_tokens=64,
            masks=[],
            world=world,
            cut=Plan.cut.fget(SimpleNamespace(max_tokens=64, world=world)),
        )
        batch = SimpleNamespace(prompt_N=[0], response_length_N=torch.ones(1))
        update = SimpleNamespace(coef_NR=None, entropy_coef_NR=None, batch=batch, moves=True)
        batches: Any = SimpleNamespace(update=update, eval_batch=None, sampler_logp_NR=None)

        def tensors(stage: str, inputs: Any, *_: Any) -> None:
            asked.append((stage, inputs))

        stages: Any = SimpleNamespace(tensors=tensors, folder=None)
        narrator: Any = Narrator()
        gradients_on_U(plan, batches, stages, narrator)
        update_statistics(plan, update.batch, {}, "statistics of U", stages, narrator)
        return [*asked, ("E", state_inputs(plan, batches))]

    one, two, three = keys(1), keys(2), keys(3)
    assert [stage for stage, _ in one] == ["gradient", "update-stats", "E"]
    assert all(key["max_tokens"] == 64 and "processes" not in key for _, key in one)
    for (_, a), (_, b) in zip(two, three, strict=True):
        assert (a.pop("processes"), b.pop("processes")) == (2, 3)
    assert one == two == three
