"""`funcprobe whatif`: rules against the core called directly, what is reused, solved and refused."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

import funcprobe
from funcprobe import tree
from funcprobe.adapters import whatif as command_module
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.results import load_whatif
from funcprobe.adapters.results.whatif_sections import RuleRow, WhatIf
from funcprobe.adapters.results.whatif_table import print_whatif
from funcprobe.adapters.rollouts import save_rollouts
from funcprobe.adapters.run import run
from funcprobe.adapters.stages.first_order import Predicted, predicted
from funcprobe.adapters.stages.observed import rewards_of_E
from funcprobe.adapters.stages.plan import load
from funcprobe.adapters.stages.rule_inputs import rule_inputs
from funcprobe.adapters.store import Stages
from funcprobe.adapters.whatif import Question
from funcprobe.rules import registry
from funcprobe.step import masked
from funcprobe.types import InputError
from support.checkpoints import edit_json, sets
from support.commands import left_in
from support.paths import ROOT

pytestmark = pytest.mark.usefixtures("offline")

RULES = ("negative_only", "entropy_bonus:0.5", "drop_tokens:3", "mask:surprisal < 2", "temperature:1.5")
MORE = "steer"


class Ran(NamedTuple):
    folder: Path
    settings: list[str]
    document: WhatIf
    found: Predicted


def small(checkpoint, folder: Path, **changes: Any) -> list[str]:
    given = {"sampling.B_E": 32, "run.folder": str(folder), "measure.etas": [1e-4]}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return sets(checkpoint.settings() | given)[1::2]


def ask(folder: Path, settings: list[str], *rules: str, **question: Any) -> WhatIf:
    (folder / "c.toml").touch()
    config = read_config(folder / "c.toml", settings)
    return command_module.whatif(config, Question(rules, **question), Narrator())[0]


@pytest.fixture(scope="module")
def ran(checkpoint, tmp_path_factory) -> Ran:
    folder = tmp_path_factory.mktemp("whatif")
    settings = small(checkpoint, folder, entropy__baseline="none")  # as the loops over E have none
    document = ask(folder, settings, *RULES, eta=1e-3)
    config = read_config(folder / "c.toml", settings)
    found = predicted(load(config, Narrator()), Stages(folder / ".stages"), Narrator())
    return Ran(folder, settings, document, found)


def row(document: WhatIf, rule: str) -> RuleRow:
    return next(one for one in document.rules if one.rule == rule)


def passes(document: WhatIf) -> dict[str, float]:
    return document.cost.total.passes


# Against the core, called directly


@pytest.mark.parametrize("rule", ["own", *RULES])
def test_a_rule_is_what_the_core_predicts_and_measures(ran, rule) -> None:
    """`predict` and `measure` with the rule's coefficients; the reward by loops over E."""
    plan, batches, _, _, own, _ = ran.found
    bound = registry.rule(rule)
    inputs, _ = rule_inputs(ran.found, bound.needs, Stages(None), Narrator())
    params, forward = plan.policy.params, plan.forward
    forward_U = funcprobe.frozen_forward(plan.policy.model, params, bound.temperature or 1.0)
    Y = funcprobe.grad_Y(params, bound.apply(inputs), forward_U)
    v = funcprobe.update_direction(params, Y, plan.adam_state, **plan.step._asdict()).total
    E = batches.eval_batch
    stats, tangent = funcprobe.tangents(params, E, v, forward)
    choices = {"entropy": plan.entropy}
    if bound.temperature is None:
        predicted_here = funcprobe.predict(
            params, E, bound.apply(inputs), plan.adam_state, forward, step=plan.step, **choices
        ).derivative
    else:
        predicted_here = tree.dot(own.X, v)
    measured = funcprobe.measure(params, E, v, 1e-3, stats, forward, **choices)
    found = row(ran.document, rule)
    assert found.entropy.predicted.value == pytest.approx(1e-3 * predicted_here, rel=1e-8, abs=0)
    assert found.entropy.measured.value == pytest.approx(measured.delta, rel=1e-7, abs=0)
    assert found.ess.value == pytest.approx(measured.ess)
    reward_N = rewards_of_E(plan, batches, Narrator())
    moved = funcprobe.token_stats(tree.axpy(1e-3, v, params), E, forward)
    w_N = (moved.logp_NR - stats.logp_NR).sum(1).exp()
    change = sum(w * r for w, r in zip(w_N.tolist(), reward_N.tolist(), strict=True)) / sum(
        w_N.tolist()
    )
    assert found.reward is not None
    assert found.reward.measured.value == pytest.approx(change - float(reward_N.mean()), rel=1e-7)
    S_N = tangent.logp_NR.sum(1)
    covariance = float(((reward_N - reward_N.mean()) * S_N).mean())
    assert found.reward.predicted.value == pytest.approx(1e-3 * covariance, rel=1e-8, abs=0)


def test_the_runs_own_rule_has_the_runs_numbers(checkpoint, tmp_path) -> None:
    """With the default baseline, of the entropy and of the reward."""
    settings = small(checkpoint, tmp_path)
    (tmp_path / "c.toml").touch()
    results, _ = run(read_config(tmp_path / "c.toml", settings), Narrator())
    own = row(ask(tmp_path, settings, "steer", eta=1e-4), "own")
    reward = next(one for one in results.observables if one.name == "reward")
    assert own.reward is not None
    for found, ran in ((own.entropy, results), (own.reward, reward)):
        at = next(one for one in ran.sweep if one.eta == 1e-4)
        assert found.predicted.value == pytest.approx(at.predicted.value, rel=1e-6)  # two routes
        assert found.measured.value == pytest.approx(at.measured.value, rel=1e-9)


@pytest.mark.parametrize("rule", RULES[:3])
def test_the_paired_difference_has_the_jackknifes_error(ran, rule) -> None:
    """Of the reward, whose estimate without a response is a quotient of two sums; 5 %, as the jackknife
    differs from the delta method by terms of order 1 / 32."""
    plan, batches, _, _, own, _ = ran.found
    params, E, reward_N = (
        plan.policy.params,
        batches.eval_batch,
        rewards_of_E(plan, batches, Narrator()),
    )
    bound = registry.rule(rule)
    inputs, _ = rule_inputs(ran.found, bound.needs, Stages(None), Narrator())
    Y = funcprobe.grad_Y(params, bound.apply(inputs), plan.forward)
    there = funcprobe.update_direction(params, Y, plan.adam_state, **plan.step._asdict()).total

    def weights(v) -> torch.Tensor:
        moved = funcprobe.token_stats(tree.axpy(1e-3, v, params), E, plan.forward)
        return (moved.logp_NR - own.stats.logp_NR).sum(1).exp()

    w_N, own_w_N = weights(there), weights(own.direction.total)
    kept = ~torch.eye(len(w_N), dtype=torch.bool)
    left = torch.stack(
        [
            (w_N * reward_N)[k].sum() / w_N[k].sum() - (own_w_N * reward_N)[k].sum() / own_w_N[k].sum()
            for k in kept
        ]
    )
    error = math.sqrt((len(left) - 1) * float(left.var(correction=0)))
    found = row(ran.document, rule).reward
    assert found is not None
    assert found.difference_se.value == pytest.approx(error, rel=0.05)
    assert found.difference_interval is not None
    assert found.difference_interval.low < found.difference.value < found.difference_interval.high


def test_the_runs_own_rule_stands_first_and_differs_by_nothing(ran) -> None:
    own = ran.document.rules[0]
    assert [one.rule for one in ran.document.rules] == ["own", *RULES]
    assert own.touched.value == own.entropy.difference.value == own.entropy.difference_se.value == 0
    assert own.weight.value == 1
    prediction = ran.found.prediction
    assert own.entropy.predicted.value == pytest.approx(1e-3 * prediction.derivative, rel=1e-9)
    for one in ran.document.rules:
        missed = one.entropy.measured.value - one.entropy.predicted.value
        assert one.entropy.missed.value == missed
        interval = one.entropy.measured_interval_given_U
        assert interval is not None
        assert one.entropy.agrees == (interval.low <= one.entropy.predicted.value <= interval.high)


def test_touched_is_the_share_of_tokens_that_change(ran) -> None:
    """Half of the tokens of U, or three of them; every token at another temperature."""
    batches = ran.found.batches
    tokens = int(batches.update.batch.response_length_N.sum())
    positive_N = torch.tensor(batches.update_rollouts.advantage) > 0
    positive = int(batches.update.batch.response_length_N[positive_N].sum())
    assert row(ran.document, "negative_only").touched.value == pytest.approx(positive / tokens)
    assert row(ran.document, "drop_tokens:3").touched.value == pytest.approx(3 / tokens)
    assert row(ran.document, "temperature:1.5").touched.value == 1
    assert row(ran.document, "entropy_bonus:0.5").touched.value == 1


def test_the_frontier_is_what_nothing_dominates(ran) -> None:
    frontier = ran.document.frontier
    assert frontier is not None
    points = {p.rule: (p.entropy, p.reward) for p in frontier.points}
    assert list(points) == [one.rule for one in ran.document.rules]
    for point in frontier.points:
        better = [
            rule
            for rule, (entropy, reward) in points.items()
            if entropy > point.entropy and reward > point.reward
        ]
        assert point.dominated == bool(better)
        assert row(ran.document, point.rule).on_frontier == (not point.dominated)
    assert 0 < sum(not p.dominated for p in frontier.points) < len(points)


# What is reused


def test_one_rule_more_costs_one_rule(ran) -> None:
    again = ask(ran.folder, ran.settings, *RULES, eta=1e-3)
    assert passes(again) == {}
    assert again.model_dump(exclude={"cost"}) == ran.document.model_dump(exclude={"cost"})
    more = ask(ran.folder, ran.settings, *RULES, MORE, eta=1e-3)
    assert passes(more) == {"E": 1.0, "U": 1.0}
    assert more.rules[:-1] == again.rules
    assert load_whatif(ran.folder / "probe.whatif.json") == more


@pytest.mark.slow
def test_a_run_leaves_the_rules_alone_to_do(probe, checkpoint, tmp_path) -> None:
    """At the next step's learning rate the run has measured its own rule, and the second derivative."""
    probe("one")
    settings = sets(checkpoint.settings() | {"run.name": "one"})[1::2]
    document = ask(tmp_path, settings, "negative_only")
    # Rules: one forward of E and one gradient of U; of E beside it the gradient of the reward.
    assert passes(document) == {"E": 2.0, "U": 1.0}
    results = json.loads(Path("runs/one/results.json").read_text())
    (swept,) = [one for one in results["sweep"] if one["is_next_lr"]]
    assert document.is_next_lr
    assert document.learning_rate.value == swept["eta"]
    assert document.rules[0].entropy.measured.value == swept["measured"]["value"]
    assert document.linear_until is not None
    assert document.linear_until.value == pytest.approx(
        results["second_order"]["linear_until"]["eta"], rel=1e-9
    )
    assert Path("runs/one.whatif.json").is_file()
    assert Path("runs/one/results.json").is_file()


# --solve


@pytest.mark.parametrize("by", ["entropy_bonus", "kl_penalty"])
def test_the_coefficient_that_is_solved_for_predicts_the_target(ran, by) -> None:
    """By the rule's own gradient pass, with the coefficient that is printed to six digits."""
    own = ran.document.rules[0].entropy.predicted.value
    target = own + 0.1 * abs(own)
    document = ask(ran.folder, ran.settings, "own", eta=1e-3, solve=f"entropy={target!r}", by=by)
    solution, plan = document.solution, ran.found.plan
    assert solution is not None
    assert document.rules[-1].rule == solution.row == f"{by}:{solution.coefficient:.6g}"
    assert registry.NAMED[by].about in document.rules[-1].about
    bound = registry.rule(f"{by}:{solution.coefficient!r}")
    inputs, _ = rule_inputs(ran.found, bound.needs, Stages(None), Narrator())
    found = funcprobe.predict(
        plan.policy.params,
        ran.found.batches.eval_batch,
        bound.apply(inputs),
        plan.adam_state,
        plan.forward,
        step=plan.step,
        entropy=plan.entropy,
    )
    assert 1e-3 * found.derivative == pytest.approx(target, rel=1e-6)
    assert abs(solution.predicted_missed.value) < 1e-9 * abs(target)
    assert solution.within_error
    interval, measured = solution.coefficient_interval, document.rules[-1].entropy
    assert interval is not None
    assert measured.measured_interval_given_U is not None
    # The slope between the run's own rule and the solution, which is near.
    slope = (target - own) / solution.coefficient
    half = measured.measured_interval_given_U.half_width / abs(slope)
    assert interval.half_width == pytest.approx(half, rel=0.5)
    assert solution.reachable[0] <= target <= solution.reachable[1]
    assert passes(document)["U"] <= 2  # one gradient; for the penalty the reference policy's forward


@pytest.mark.slow  # as many as twelve gradients
def test_a_share_is_found_by_halving(ran) -> None:
    own = ran.document.rules[0].entropy.predicted.value
    half = ask(ran.folder, ran.settings, "top_entropy:0.5", eta=1e-3).rules[1].entropy.predicted.value
    target = (own + half) / 2
    document = ask(
        ran.folder, ran.settings, "own", eta=1e-3, solve=f"entropy={target!r}", by="top_entropy"
    )
    solution = document.solution
    assert solution is not None
    assert 0.02 <= solution.coefficient <= 1
    assert solution.passes <= 12
    found = row(document, solution.row).entropy.predicted.value
    assert abs(found - target) < abs(own - half)
    assert solution.predicted_missed.value == pytest.approx(found - target)


def test_a_value_out_of_reach_is_said_with_the_range(ran) -> None:
    with pytest.raises(InputError, match=r"no argument of entropy_bonus reaches it; .* -\d.* to \+\d"):
        ask(ran.folder, ran.settings, "own", eta=1e-3, solve="entropy=5")


# Without rewards, with some, with masks of dropout


def test_without_rewards_there_are_no_columns_of_them(ran, monkeypatch) -> None:
    def none(*_: Any) -> torch.Tensor:
        raise InputError("no response of E has a reward")

    monkeypatch.setattr(command_module, "rewards_of_E", none)
    document = ask(ran.folder, ran.settings, *RULES, eta=1e-3)
    assert document.reward is document.frontier is None
    assert [one.reward for one in document.rules] == [None] * 6
    assert [one.entropy for one in document.rules] == [one.entropy for one in ran.document.rules]
    assert not any("reward" in line for line in document.findings)


def test_responses_without_a_reward_do_not_count(ran, monkeypatch) -> None:
    plan, batches, _, _, own, _ = ran.found
    reward_N = rewards_of_E(plan, batches, Narrator())
    reward_N[::3] = math.nan
    monkeypatch.setattr(command_module, "rewards_of_E", lambda *_: reward_N)
    document = ask(ran.folder, ran.settings, "own", eta=1e-4)
    assert document.reward is not None
    kept = ~reward_N.isnan()
    assert document.reward.value == pytest.approx(float(reward_N[kept].mean()))
    v = own.direction.total
    moved = funcprobe.token_stats(
        tree.axpy(1e-4, v, plan.policy.params), batches.eval_batch, plan.forward
    )
    w_N = (moved.logp_NR - own.stats.logp_NR).sum(1).exp()[kept]
    change = float((w_N * reward_N[kept]).sum() / w_N.sum() - reward_N[kept].mean())
    assert document.rules[0].reward is not None
    assert document.rules[0].reward.measured.value == pytest.approx(change, rel=1e-7)
    assert document.rules[0].reward.predicted.value == pytest.approx(change, rel=0.05)


@pytest.mark.slow  # three masks of dropout
def test_with_masks_v_is_the_mean_over_them(damaged, tmp_path) -> None:
    edit_json(damaged.adapter / "adapter_config.json", lora_dropout=0.3)
    settings = small(damaged, tmp_path, step__masks=3)
    document = ask(tmp_path, settings, "negative_only", eta=1e-3, solve="entropy=0")
    config = read_config(tmp_path / "c.toml", settings)
    found = predicted(load(config, Narrator()), Stages(tmp_path / ".stages"), Narrator())
    plan, params = found.plan, found.plan.policy.params
    inputs, _ = rule_inputs(found, (), Stages(None), Narrator())
    update = registry.rule("negative_only").apply(inputs)
    Y = [funcprobe.grad_Y(params, update, forward) for forward in plan.masks]
    v = masked.mean_direction(params, Y, plan.adam_state, plan.step).total
    predicted_here = 1e-3 * tree.dot(found.prediction.X, v)
    assert row(document, "negative_only").entropy.predicted.value == pytest.approx(predicted_here)
    assert document.solution is not None
    assert abs(document.solution.predicted_missed.value) < 1e-12
    assert any("3 masks" in line for line in document.limits)


# Losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("dapo", marks=pytest.mark.slow), "grpo"])
def test_the_unit_of_a_loss_is_its_divisor(checkpoint, tmp_path, kind) -> None:
    """What advantage 1 counts: 1 / tokens, or 1 / (N T_i); a KL term in the loss leaves it alone."""
    loss = {"objective__loss": "trl", "objective__settings__loss_type": kind}
    settings = small(checkpoint, tmp_path, **loss, objective__settings__beta=0.3)
    (tmp_path / "c.toml").touch()
    config = read_config(tmp_path / "c.toml", settings)
    found = predicted(load(config, Narrator()), Stages(tmp_path / ".stages"), Narrator())
    inputs, why = rule_inputs(found, (), Stages(None), Narrator())
    T_N = found.batches.update.batch.response_length_N
    divisor_N = T_N.sum() * torch.ones(len(T_N)) if kind == "dapo" else len(T_N) * T_N
    expected_NR = inputs.mask_NR / divisor_N[:, None].double()
    torch.testing.assert_close(inputs.unit_NR, expected_NR, rtol=1e-12, atol=0)
    assert why == {}
    document = ask(tmp_path, settings, "entropy_bonus:0.1", "kl_penalty:0.04", eta=1e-3)
    assert document.rules[1].touched.value == 1
    assert document.rules[1].entropy.difference.value > 0


@pytest.mark.slow
def test_a_loss_without_advantages_has_no_unit(checkpoint, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "def f(logp, entropy, batch):\n"
        "    return -((logp * batch.mask_NR).sum() / batch.mask_NR.sum())\n"
    )
    settings = small(checkpoint, tmp_path, objective__loss=f"{tmp_path / 'mine.py'}:f")
    document = ask(tmp_path, settings, "mask:surprisal < 2", eta=1e-3)
    assert len(document.rules) == 2
    for rule in ("entropy_bonus:0.1", "kl_penalty"):
        with pytest.raises(InputError, match="does not depend on the advantages"):
            ask(tmp_path, settings, rule, eta=1e-3)


@pytest.mark.slow
def test_columns_of_a_supplied_U_are_what_rules_read(ran, checkpoint, tmp_path) -> None:
    """Ratios to old_logp, and the reference's log-probabilities, without a forward for them."""
    rollouts, logp_NR = ran.found.batches.update_rollouts, ran.found.prediction.update_stats.logp_NR
    logp = [row[: len(ids)] for row, ids in zip(logp_NR.tolist(), rollouts.response_ids, strict=True)]
    old, reference = ([[x + shift for x in row] for row in logp] for shift in (-0.5, 0.25))
    file = tmp_path / "update.parquet"
    save_rollouts(rollouts._replace(old_logp=old, ref_logp=reference), file)
    settings = small(checkpoint, tmp_path, rollouts__update=str(file))
    document = ask(tmp_path, settings, "clip:0.2,0.28", "kl_penalty:0.1", eta=1e-3)
    # A ratio of exp(0.5) is clipped where A > 0, and counts where A < 0.
    positive, negative = (
        ask(tmp_path, settings, f"weight:{weight}", eta=1e-3).rules[1]
        for weight in ("where(advantage > 0, 1, 0)", "where(advantage < 0, exp(0.5), 0)")
    )
    clipped = document.rules[1]
    assert clipped.entropy.measured.value == pytest.approx(negative.entropy.measured.value, rel=1e-6)
    assert clipped.weight.value == pytest.approx(negative.weight.value, rel=1e-9)
    assert clipped.weight.value != pytest.approx(positive.weight.value, rel=0.01)
    assert passes(document)["U"] <= 5  # Y, first order, clipping; and one for each of the two rules


def test_a_U_without_gradient_has_rules_that_move(checkpoint, tmp_path) -> None:
    equal = {"reward__function": f"{checkpoint.rewards}:equal"}
    settings = small(checkpoint, tmp_path, **equal)
    document = ask(
        tmp_path, settings, "negative_only", "entropy_bonus:0.1", eta=1e-3, solve="entropy=0"
    )
    own, negative, bonus, solution = document.rules
    assert negative.entropy.difference.value == negative.touched.value == 0
    assert bonus.entropy.difference.value > 0
    assert bonus.entropy_weight.value > 0
    assert bonus.entropy_weight.normalised_by.startswith("sum over U itself")
    assert solution.entropy.predicted.value == pytest.approx(0, abs=1e-12)
    assert own.reward is not None  # equal rewards do not change
    assert own.reward.predicted.value == own.reward.measured.value == 0
    assert not any("negative_only keeps" in line for line in document.findings)


# The default list


@pytest.mark.slow
def test_the_default_leaves_out_what_a_run_cannot_have(ran) -> None:
    document = ask(ran.folder, ran.settings, eta=1e-3)
    assert [one.rule.partition(":")[0] for one in document.left_out] == ["clip", "kl_cov"]
    lacking = (
        "U has no log-probabilities at the policy that sampled it: supply them as the column old_logp"
    )
    assert document.left_out[0].reason == f"{lacking} of rollouts.update"
    assert len(document.rules) >= 13
    assert {one.verdict for one in document.rules} == {"trust"}
    for rules in ((), ("clip",)):  # asked for, in the configuration or by an option
        settings = [*ran.settings, 'whatif.rules=["clip"]'] if not rules else ran.settings
        with pytest.raises(InputError, match=f"^rule clip:0.2,0.28: {lacking}"):
            ask(ran.folder, settings, *rules, eta=1e-3)


# The command


def test_the_command_prints_the_table_and_writes_the_file(command, ran) -> None:
    given = [part for one in ran.settings for part in ("--set", one)]
    Path("c.toml").touch()
    outcome = command(
        "whatif", "c.toml", *given, "--rule", "negative_only", "--mask", "surprisal < 2",
        "--eta", "1e-3", "--out", "here/w.json", "--solve", "entropy=-1e-4",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    for words in ("negative_only", "surprisal < 2", "Solved, entropy change -0.0001: entropy_bonus:"):
        assert words in outcome.out
    assert "keeps" in outcome.out or "loses the least" in outcome.out
    places = [outcome.out.index(words) for words in ("Solved, ", "──")]
    assert places == sorted(places)
    assert "The run's own rule: " not in outcome.out
    assert "wrote here/w.json" in outcome.err
    page = (ROOT / "docs" / "whatif.md").read_text(encoding="utf-8")
    assert head_of(page) == head_of(outcome.out)
    explained = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(explained) == 7
    console = Console(width=120, file=io.StringIO(), highlight=False)
    print_whatif(load_whatif("here/w.json"), console, verbose=True)
    heads = head_of(console.file.getvalue())
    for column in explained:
        assert set(column.split()) <= set(heads[0]) | set(heads[1]), column
    document = load_whatif("here/w.json")
    assert [one.rule for one in document.rules[:3]] == ["own", "negative_only", "mask:surprisal < 2"]


def head_of(text: str) -> list[list[str]]:
    """The words of the two lines over the rule of dashes."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    return [line.split() for line in lines[rule - 2 : rule]]


def test_a_wrong_rule_waits_for_no_import_and_a_repeated_one_is_said(command, ran) -> None:
    given = [part for one in ran.settings for part in ("--set", one)]
    Path("c.toml").touch()
    outcome = command("whatif", "c.toml", *given, "--rule", "negativ_only")
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
    again = ("--rule", "negative_only", "--rule", "negative_only", "--eta", "1e-3")
    outcome = command("whatif", "c.toml", *given, *again)
    assert outcome.status == 0, outcome.err
    assert "rule negative_only is given 2 times: it has one row\n" in outcome.err
    table = outcome.out[outcome.out.index("──") :]
    assert table.count("\nnegative_only ") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rule", "negativ_only"), "unknown rule"),
        (("--rule", "negative_only:3"), "takes no argument"),
        (("--rule", "entropy_bonus:x"), "expected a number"),
        (("--rule", "temperature:0"), "expected a number above 0"),
        (("--mask", "__import__('os')"), "cannot be read at"),
        (("--mask", ""), "needs its argument"),
        (("--solve", "entropy"), "expected entropy=VALUE"),
        (("--solve", "reward=0"), "expected entropy=VALUE"),
        (("--solve", "entropy=nan"), "expected entropy=VALUE"),
        (("--solve", "entropy=0", "--with", "stare"), "no coefficient that can be solved for"),
        (("--solve", "entropy=0", "--with", "zork"), "unknown rule"),
        (("--eta", "0"), "a positive, finite learning rate"),
        (("--eta", "nan"), "a positive, finite learning rate"),
        (("--out", "."), "is a folder"),
        (("--out", "c.toml/x/y"), "cannot be written"),
        (("--out", "x" * 300), "cannot be written"),
        (("--rule", "drop_prompt:99"), "U has no prompt 99"),
        (("--set", "optimizer.rule=sgd"), "give --eta"),
        (("--set", 'whatif.rules=[""]'), "whatif.rules"),
    ],
)  # fmt: skip
def test_refusals(command, ran, options, said) -> None:
    given = [part for one in ran.settings for part in ("--set", one)]
    Path("c.toml").touch()
    outcome = command("whatif", "c.toml", *given, "--set", "run.folder=here", *options)
    assert (outcome.status, outcome.out) == (2, "")
    last = outcome.err.splitlines()[-1]
    assert last.startswith("funcprobe: ")
    assert said in last
    assert left_in(Path("here")) == []
    assert [path.name for path in Path.cwd().iterdir() if path.is_file()] == ["c.toml"]


@pytest.mark.slow
def test_an_interrupt_leaves_the_file_before_and_whole_stages(command, ran, monkeypatch) -> None:
    given = [part for one in ran.settings for part in ("--set", one)]
    Path("c.toml").touch()
    Path("w.json").write_text("mine")
    ask_for = (
        "whatif",
        "c.toml",
        *given,
        "--set",
        "run.folder=here",
        "--eta",
        "1e-3",
        "--out",
        "w.json",
    )
    asked = [word for rule in RULES for word in ("--rule", rule)]
    outcome_of, count = command_module.outcome, 0

    def interrupted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return outcome_of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(command_module, "outcome", interrupted)
        ended = command(*ask_for, *asked)
    assert ended.status == 130
    assert "finished stages are stored, no incomplete file was left" in ended.err
    assert Path("w.json").read_text() == "mine"
    assert left_in(Path("here")) == []
    ended = command(*ask_for, *asked)
    assert ended.status == 0, ended.err
    # Of five rules three are left, and the third's is new.
    assert passes(load_whatif("w.json")) == {"E": 3.0, "U": 3.0}


def test_a_full_disk_leaves_the_file_before(command, ran, monkeypatch) -> None:
    given = [part for one in ran.settings for part in ("--set", one)]
    Path("c.toml").touch()
    Path("w.json").write_text("mine")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("funcprobe.adapters.store.write_json", full)
    outcome = command("whatif", "c.toml", *given, "--rule", "own", "--eta", "1e-3", "--out", "w.json")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.endswith("funcprobe: No space left on device; no incomplete file was left\n")
    assert Path("w.json").read_text() == "mine"
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["c.toml", "w.json"]
