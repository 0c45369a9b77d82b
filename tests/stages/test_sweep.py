"""The sweep of a run: second order, verdicts, responses sampled anew, baselines and intervals."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from scipy import stats as scipy_stats

import funcprobe
from funcprobe import tree
from funcprobe.adapters.checkpoint import model
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.rollouts import load_rollouts, save_rollouts
from funcprobe.adapters.rollouts.ragged import Ragged
from funcprobe.adapters.sampling.generate import sample_responses
from funcprobe.adapters.stages import fresh, plan, sweep
from funcprobe.adapters.stages.batches import derived_seed, sample
from funcprobe.adapters.store import Stages
from funcprobe.policy.forward import with_params
from funcprobe.statistics import baselines, estimators, evaluation
from support.checkpoints import sets
from support.estimators import ESTIMATORS, each_estimator, random_statistics, rows
from support.policies import random_batch, random_like, tiny_policy
from support.slow import first

# Second order


@pytest.mark.parametrize("per", first(1, ["token", "sequence"]))
def test_both_second_derivatives_of_a_run_agree(ran, per) -> None:
    """To 1e-5, the bound of test_second_tangents; their errors too."""
    found = {}
    for method in ("difference", "exact"):
        document, _ = ran(measure__second_order=method, entropy__per=per)
        found[method] = document["second_order"]
    assert found["exact"]["difference_eta"] is found["exact"]["rounding"] is None
    for key in ("second_derivative", "se_given_U", "eta_star"):
        near = found["difference"][key]["value"]
        assert near == pytest.approx(found["exact"][key]["value"], rel=1e-5)
    rounding = found["difference"]["rounding"]["value"]
    assert 0 < rounding < 1e-5 * abs(found["exact"]["second_derivative"]["value"])


@pytest.mark.slow
def test_the_quadratic_term_is_what_first_order_lacks(ran) -> None:
    document, outcome = ran("-v", measure__etas=[1e-5, 1e-4])
    left = []
    for row in document["sweep"]:
        gap = row["measured"]["value"] - row["predicted"]["value"]
        assert row["difference"]["value"] == pytest.approx(gap, rel=1e-9)
        left.append(row["measured"]["value"] - row["second_order"]["value"])
        assert abs(left[-1]) < 0.1 * abs(gap)
    assert left[1] / left[0] == pytest.approx(1000, rel=0.1)  # cubic
    second, first = (document[order] for order in ("second_order", "first_order"))
    star = 2 * abs(first["derivative"]["value"] / second["second_derivative"]["value"])
    assert second["eta_star"]["value"] == pytest.approx(star)
    assert f"the quadratic term is 10 % of the linear one at eta = {star / 10:.2g} (" in outcome.flat


@pytest.mark.slow
def test_rounding_noise_of_few_sequences_is_that_of_all() -> None:
    """And both are the scatter of 60 measured changes about a parabola: each to a factor of 1.5.

    The scatter has a relative error of 9 %, the others, of 128 and of 32 residuals, of 10 to 25 %, as
    sequences differ in length; the noise of the statistics at theta is in them alone.
    """
    model = tiny_policy(dtype=torch.float32)
    probe = funcprobe.bind(model)
    params = probe.params
    batch = random_batch([(i % 40, 2 + i % 3, 1 + i % 6) for i in range(128)])
    v = random_like(params)
    stats, tangent = probe.tangents(params, batch, v)
    at = funcprobe.evaluate(batch, stats, funcprobe.Entropy(baseline="none"))
    step = 1e3 * torch.finfo(torch.float32).eps / float(tangent.logp_NR.square().mean().sqrt())

    def moved(eta: float) -> funcprobe.TokenStats:
        return probe.token_stats(tree.axpy(eta, v, params), batch)

    there = tuple(moved(eta) for eta in (step / 2, step, -step / 2, -step))
    few_n = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:32].sort().values
    of_few = tuple(
        sweep._with_rows(stats, few_n, funcprobe.TokenStats(*(x_NR[few_n] for x_NR in one)))
        for one in there
    )
    every = sweep.noise_of(at, sweep.Tiny(torch.arange(128), there))
    found = sweep.noise_of(at, sweep.Tiny(few_n, of_few))
    etas = step * torch.linspace(-1, 1, 60, dtype=torch.float64)
    changes = [funcprobe.change(at, moved(float(eta))).delta for eta in etas]
    delta = torch.tensor(changes, dtype=torch.float64)
    powers = torch.stack([torch.ones(60).double(), etas / step, (etas / step) ** 2], 1)
    left = delta - powers @ torch.linalg.lstsq(powers, delta).solution
    scatter = float((left.square().sum() / (60 - 3)).sqrt())
    assert 1 / 1.5 < found / every < 1.5
    assert 1 / 1.5 < every / scatter < 1.5


@pytest.mark.slow
def test_no_second_order_where_it_is_rounding_or_not_asked_for(ran) -> None:
    document, outcome = ran("-v", policy__dtype="bfloat16")
    assert document["second_order"] is None
    assert (
        "second order is omitted: in torch.bfloat16 (policy.dtype, policy.precision) it is"
        in outcome.err
    )
    assert "2nd order" not in outcome.out
    document, outcome = ran(measure__second_order="none")
    assert document["second_order"] is document["sweep"][0]["second_order"] is None
    assert "second order" not in outcome.err


@each_estimator
def test_measured_meets_predicted_where_first_order_holds(probe64, entropy) -> None:
    """At 1e-8, 3e-7 and 1e-5 of the eta whose quadratic term is 10 %, where it is 1e-6 at most.

    Along X, so that the derivative does not cancel and rounding, 1e-16 of the sums, stays under 1e-6
    of the change at the smallest.
    """
    batch = random_batch([(i % 7, 2 + i % 3, 1 + i % 6) for i in range(24)])
    entropy = entropy._replace(baseline="auto")
    params, stats = probe64.params, probe64.token_stats(probe64.params, batch)
    at = funcprobe.evaluate(batch, stats, entropy)
    p, q = evaluation.gradient_coefficients(at)
    v = probe64.weighted_grad(params, batch, p, q)
    first = funcprobe.derivative(at, probe64.tangents(params, batch, v)[1], batch.prompt_N)
    second = funcprobe.second_derivative(
        at, *probe64.second_tangents(params, batch, v)[1:], batch.prompt_N
    )
    scale = funcprobe.eta_star(first.derivative, second.derivative) / 10

    def gap(eta):
        change = probe64.measure(params, batch, v, eta, stats, entropy=entropy)
        return change.delta / (eta * first.derivative) - 1

    gaps = [gap(part * scale) for part in (1e-8, 3e-7, 1e-5)]
    assert max(map(abs, gaps)) < 1e-4
    assert abs(gaps[2]) == pytest.approx(1e-6, rel=0.1)


# Baselines


@pytest.mark.slow
def test_a_run_takes_ridge_where_it_has_a_place(ran) -> None:
    found = {}
    for name, changes in {
        "auto": {},
        "ridge": {"entropy__baseline": "ridge"},
        "none": {"entropy__baseline": "none"},
        "sampled": {"entropy__integrand": "sampled"},
        "clip": {"entropy__clip": 5.0},
    }.items():
        document, _ = ran(**changes)
        found[name] = (
            document["conventions"]["entropy"]["baseline"],
            document["first_order"]["derivative"]["value"],
        )
        assert all(check["passed"] or check["advisory"] for check in document["checks"])
        ratio = document["sweep"][0]["ratio"]["value"]
        assert ratio == pytest.approx(1, abs=0.02)  # measured and predicted with the same one
    assert found["auto"] == found["ridge"]
    assert [found[name][0] for name in ("ridge", "none", "sampled", "clip")] == [
        "ridge",
        "none",
        "none",
        "none",
    ]
    assert found["none"] == found["clip"]  # no weight is over 5
    assert found["none"][1] != pytest.approx(found["ridge"][1], rel=1e-3)


def test_two_prompts_leave_no_room_for_ridge() -> None:
    batch = random_batch([(i % 2, 2, 3) for i in range(6)])
    assert baselines.resolve(funcprobe.Entropy(), batch, own_samples=True).baseline == "none"
    batch = random_batch([(i % 3, 2, 3) for i in range(6)])
    assert baselines.resolve(funcprobe.Entropy(), batch, own_samples=True).baseline == "ridge"
    assert baselines.resolve(funcprobe.Entropy(), batch, own_samples=False).baseline == "none"
    chosen = funcprobe.Entropy(baseline="position")
    assert baselines.resolve(chosen, batch, own_samples=False) == chosen


@pytest.mark.slow
def test_the_first_sequences_of_e_may_be_of_one_prompt(ran) -> None:
    """The check of eta = 0 takes 32 of them, where ridge, asked for, would have no room."""
    ran()
    drawn = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    prompts = sorted(set(drawn.prompt_index))[:3]
    index = [drawn.prompt_index.index(p) for p in prompts for _ in range(35)]
    kept = {
        k: [v[i] for i in index] for k, v in drawn._asdict().items() if isinstance(v, list | Ragged)
    }
    save_rollouts(drawn._replace(**kept), Path("three.parquet"))
    document, _ = ran(rollouts__eval="three.parquet", entropy__baseline="ridge")
    assert document["conventions"]["entropy"]["baseline"] == "ridge"
    (zero,) = [c for c in document["checks"] if c["name"] == "eta = 0 changes nothing"]
    assert zero["passed"]


@pytest.mark.parametrize("other", [{"entropy.integrand": "sampled"}, {"entropy.clip": 3.0}])
def test_a_baseline_without_a_place_is_refused(command, checkpoint, other) -> None:
    Path("c.toml").touch()
    given = checkpoint.settings() | {"entropy.baseline": "ridge"} | other
    outcome = command("run", "c.toml", *sets(given), "--dry-run")
    assert outcome.status == 2
    assert 'baseline = "ridge" with' in outcome.err
    assert outcome.err.count("\n") == 1


# Intervals


@pytest.mark.slow
def test_intervals_are_students(ran) -> None:
    document, _ = ran()
    first, row = document["first_order"], document["sweep"][0]
    most = scipy_stats.t.ppf(0.975, 1)
    # Of the difference to another U's step, which has an error over U of its own.
    given_U, over_U = (first[se]["value"] for se in ("se_given_U", "se_over_U"))
    next_U = {"value": math.sqrt(given_U**2 + 2 * over_U**2)}
    for value, se, interval in (
        (first["derivative"], first["se_given_U"], first["interval_given_U"]),
        (first["derivative"], first["se_over_U"], first["interval_over_U"]),
        (first["derivative"], first["se_total"], first["interval_total"]),
        (first["derivative"], next_U, first["interval_next_U"]),
        (row["predicted"], row["se_total"], row["interval_total"]),
        (row["measured"], row["measured_se_given_U"], row["measured_interval_given_U"]),
        (row["difference"], row["difference_se"], row["difference_interval"]),
    ):
        low, high, dof = interval.values()
        assert (high - low) / 2 == pytest.approx(
            scipy_stats.t.ppf(0.975, dof) * se["value"], rel=1e-8, abs=0
        )
        assert (low + high) / 2 == pytest.approx(value["value"], rel=1e-9, abs=0)
        assert 1.96 < (high - low) / 2 / se["value"] < most
    # Predicted and measured share their noise at a small eta; their difference has next to none.
    assert row["measured_se_given_U"]["value"] == pytest.approx(row["se_given_U"]["value"], rel=0.05)
    assert row["difference_se"]["value"] < 0.05 * row["se_given_U"]["value"]


def test_the_paired_difference_is_judged_by_its_own_influence(ran, checkpoint) -> None:
    """Leave-one-out of measured - eta derivative, E's draws the units, against the delta method."""
    stats, moved, _, mask = random_statistics(seed=4)
    tangent = funcprobe.TokenStats(*(m - s for m, s in zip(moved, stats, strict=True)))
    entropy = ESTIMATORS[0]

    def gap(index):
        part = [rows(s, index) for s in (stats, tangent, moved)]
        units = torch.arange(len(index))
        first = funcprobe.first_order(*part[:2], mask[index], units, entropy)
        change = funcprobe.measured_change(part[0], part[2], mask[index], entropy)
        return change.delta - first.derivative, change.influence_N - first.influence_N

    whole, influence = gap(torch.arange(4))
    copies = 10_000
    for m in range(4):
        heavier, _ = gap(torch.cat([torch.arange(4).repeat(copies), torch.tensor([m])]))
        assert (heavier - whole) * copies == pytest.approx(float(influence[m]), rel=1e-3, abs=1e-6)


# Verdicts and fresh responses


@pytest.mark.slow
def test_weights_that_say_too_little_are_said_to(ran) -> None:
    document, outcome = ran("-v", measure__etas=[1e-6, 30.0])
    small, large = document["sweep"]
    assert (small["verdict"], large["verdict"]) == ("trust", "resample")
    assert large["resampled"] is None
    assert f"resample at eta 30: {large['verdict_reason']}" in outcome.flat
    assert "to sample responses there: --set measure.resample=true" in outcome.out


@pytest.mark.parametrize("brought", first(1, [False, True]))
def test_fresh_responses_are_of_the_moved_policy(checkpoint, command, brought) -> None:
    """By a second model whose weights are theta + eta v, and loops over its responses.

    A brought E has its own temperature and length, and ratios to its sampler; top_p is not U's.
    """
    given = checkpoint.settings() | {"run.name": "one"}
    Path("c.toml").touch()
    if brought:
        given |= {"sampling.temperature": 0.7, "sampling.max_new_tokens": 3}
        assert command("run", "c.toml", *sets(given)).status == 0
        path = Path("runs/one/rollouts/eval.parquet")
        E = load_rollouts(path, 14, rewards=False)
        assert "length" in E.finish_reason
        save_rollouts(E._replace(sampler_logp=[[-1.5] * len(y) for y in E.response_ids]), path)
        given |= {"rollouts.eval": str(path), "sampling.max_new_tokens": 9, "sampling.top_p": 0.5}
        given |= {"sampling.top_k": 2, "rollouts.update": "runs/one/rollouts/update.parquet"}
        # Which has theta alone: it is not asked, and is not there.
        given |= {"sampling.engine": "server", "server.url": "http://h", "server.model": "m"}
    config = read_config(Path("c.toml"), sets(given)[1::2])
    planned = plan.load(config, Narrator())
    batches = sample(planned, Stages(None), Narrator())
    params = planned.policy.params
    v, eta = random_like(params), 0.05
    stats = funcprobe.token_stats(params, batches.eval_batch, planned.forward)
    at = funcprobe.evaluate(batches.eval_batch, stats, sampler_logp_NR=batches.sampler_logp_NR)
    before = {n: (p.data_ptr(), p.clone()) for n, p in planned.policy.model.named_parameters()}
    found = fresh.sample_again(planned, batches, at, v, eta, torch.arange(12), Stages(None), Narrator())
    for name, p in planned.policy.model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])

    other = model.Policy(**planned.policy._asdict() | {"model": deepcopy(planned.policy.model)})
    with torch.no_grad():
        for name, p in other.model.named_parameters():
            if name in v:
                p.add_(eta * v[name])
    ids = batches.eval_rollouts.prompt_ids
    like_E = config.sampling.model_copy(
        update={
            "engine": "batched",
            "top_p": 1.0,
            "top_k": 0,
            **({"max_new_tokens": 3} if brought else {}),
        }
    )
    seed = derived_seed(config.run.seed, f"E at eta {eta!r}")
    drawn = sample_responses(other, ids, like_E, seed)
    assert drawn.ids == found.rollouts.response_ids != batches.eval_rollouts.response_ids
    bound = funcprobe.bind(other.model, temperature=0.7 if brought else 1.0)
    batch = funcprobe.collate(ids, drawn.ids, batches.eval_rollouts.prompt_index)
    there = bound.token_stats(bound.params, batch)

    def per_token(s, responses, sampler_logp):
        """Sum of w h over sum of w, w of the tokens before."""
        total = weights = 0.0
        for i, y in enumerate(responses):
            log_weight = 0.0
            for k in range(len(y)):
                total += math.exp(log_weight) * float(s.entropy_NR[i, k])
                weights += math.exp(log_weight)
                log_weight += 0.0 if sampler_logp is None else float(s.logp_NR[i, k]) - sampler_logp
        return total / weights

    here = per_token(stats, batches.eval_rollouts.response_ids, -1.5 if brought else None)
    assert found.delta == pytest.approx(per_token(there, drawn.ids, None) - here, rel=1e-10)
    assert 0 < found.error.se < math.inf


@pytest.mark.slow
def test_a_brought_e_that_cannot_be_sampled_again_is_refused_before(command, checkpoint) -> None:
    given = checkpoint.settings() | {"run.name": "one", "sampling.max_new_tokens": 20}
    Path("c.toml").touch()
    assert command("run", "c.toml", *sets(given)).status == 0
    path = Path("runs/one/rollouts/eval.parquet")
    E = load_rollouts(path, 14, rewards=False)
    ended = [i for i, reason in enumerate(E.finish_reason) if reason == "stop"]
    kept = {k: [x[i] for i in ended] for k, x in E._asdict().items() if isinstance(x, list | Ragged)}
    save_rollouts(E._replace(**kept), path)
    given |= {
        "rollouts.eval": str(path),
        "rollouts.update": "runs/one/rollouts/update.parquet",
        "run.max_tokens": 30,
        "sampling.max_new_tokens": 100,
    }
    assert command("run", "c.toml", *sets(given), "--dry-run").status == 0
    given["measure.resample"] = True
    outcome = command("run", "c.toml", *sets(given), "--dry-run")
    assert outcome.status == 2
    assert "lower sampling.max_new_tokens" in outcome.err


@pytest.mark.slow
def test_a_run_samples_again_where_it_may(ran) -> None:
    document, outcome = ran("-v", measure__etas=[1e-6, 30.0], measure__resample=True)
    small, large = document["sweep"]
    assert small["resampled"] is None
    low, high, _ = large["resampled"]["interval"].values()
    assert low < large["resampled"]["change"]["value"] < high
    assert "resampled at theta + 30 v: entropy change " in outcome.flat
    again = load_rollouts(Path("runs/one/rollouts/eval-at-30.parquet"), 14, rewards=False)
    before = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    assert again.prompt_index == before.prompt_index
    assert again.response_ids != before.response_ids
    assert large["measured_interval_given_U"] is large["difference_interval"] is None
    assert document["checks"][-1]["name"] == "the model's weights are untouched"
    assert document["checks"][-1]["passed"]


@each_estimator
def test_influence_of_the_entropy_is_what_one_more_copy_adds(entropy) -> None:
    stats, _, log_ratio, mask = random_statistics(seed=2)
    influence = estimators.entropy_influence(stats, mask, entropy, log_ratio)
    assert float(influence.sum()) == pytest.approx(0, abs=1e-12)
    whole = estimators.entropy_value(stats, mask, entropy, log_ratio)
    copies = 10_000
    for n in range(4):
        index = torch.cat([torch.arange(4).repeat(copies), torch.tensor([n])])
        more = estimators.entropy_value(rows(stats, index), mask[index], entropy, log_ratio[index])
        assert (more - whole) * copies == pytest.approx(float(influence[n]), rel=1e-3, abs=1e-6)


def test_with_params_swaps_and_gives_back() -> None:
    policy = tiny_policy()
    probe = funcprobe.bind(policy)
    moved = tree.axpy(0.1, random_like(probe.params), probe.params)
    other = tiny_policy()
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(moved.get(name, p))
    tokens = torch.tensor([[1, 4, 2]])
    before = dict(policy.named_parameters())
    with torch.no_grad():
        inside = with_params(policy, moved, lambda: policy(input_ids=tokens).logits)
        assert torch.equal(inside, other(input_ids=tokens).logits)
        assert not torch.equal(inside, policy(input_ids=tokens).logits)
    with pytest.raises(ZeroDivisionError):
        with_params(policy, moved, lambda: 1 // 0)
    after = dict(policy.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    with pytest.raises(ValueError, match="names do not match"):
        with_params(policy, {"nowhere": torch.zeros(1)}, lambda: None)
    name = next(iter(moved))
    with pytest.raises(ValueError, match="has shape"):
        with_params(policy, {name: torch.zeros(1)}, lambda: None)
