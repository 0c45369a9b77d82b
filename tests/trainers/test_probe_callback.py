"""The callback inside a training: the numbers of each step, and how it says that there are none."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from transformers import (
    Trainer,
    TrainerCallback,
)

import funcprobe
from funcprobe import InputError, tree
from funcprobe.adapters import rollouts
from funcprobe.adapters.trainers import ProbeCallback, live, probe
from support.slow import first
from support.trainers import (
    dropped_out_grpo,
    outcome,
    plain_trainer,
    probe_config,
    require_same,
    trainable,
)

# Most of these trainers have dropout; test_dropout_in_training.py has the warning.
pytestmark = pytest.mark.filterwarnings("ignore:funcprobe. dropout in training:UserWarning")


def test_eval_batches_are_independent_draws_of_the_plain_policy(checkpoint, tmp_path):
    """Another for each step and seed, the same again, and without the model's own sampling options."""
    policy = live.live_policy(plain_trainer(checkpoint, tmp_path), 10**6)
    found = []
    for seed, step, min_p in [(0, 1, None), (0, 2, None), (1, 1, None), (1, 2, None), (0, 1, 0.9)]:
        config = probe_config(checkpoint, run={"seed": seed})
        source = probe.load_eval(config, policy)
        policy.model.get_base_model().generation_config.min_p = min_p
        with live.at_rest(policy.model):
            batch, sampler_logp, _ = probe._eval_batch(policy, source, config, step)
        assert sampler_logp is None
        found.append([tokens.tolist() for tokens in batch])
    assert found[4] == found[0]
    assert all(found[i] != found[j] for i in range(4) for j in range(i))


def with_adamw(trainer: Trainer, params: Any, lr: float = 3e-2) -> Trainer:
    """An optimizer of the user's own."""
    trainer.optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.1)
    return trainer


def grpo(checkpoint, folder):
    return dropped_out_grpo(checkpoint, folder, learning_rate=3e-2)


def bitsandbytes_adamw(checkpoint, folder):
    return plain_trainer(checkpoint, folder, optim="adamw_bnb_8bit", learning_rate=3e-2)


def all_parameters(checkpoint, folder):
    """AdamW(model.parameters()): the frozen ones never get a gradient, or a state."""
    trainer = plain_trainer(checkpoint, folder)
    return with_adamw(trainer, trainer.model.parameters())


def an_empty_first_group(checkpoint, folder):
    """As [decay, no decay] of nothing but norms: its learning rate is no parameter's."""
    trainer = plain_trainer(checkpoint, folder)
    return with_adamw(trainer, [{"params": [], "lr": 0.5}, {"params": trainable(trainer)}])


def a_late_gradient(checkpoint, folder):
    """A parameter without gradient in the first step: its state begins when the others' is there."""
    trainer = plain_trainer(checkpoint, folder, learning_rate=3e-2)

    class Late(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 0:
                trainable(trainer)[2].grad = None

    trainer.add_callback(Late())
    return trainer


def compiled_layers(checkpoint, folder):
    trainer = plain_trainer(checkpoint, folder, gradient_checkpointing=False, learning_rate=3e-2)
    for layer in trainer.model.get_base_model().model.layers:
        layer.compile(backend="eager")
    return trainer


OPTIMIZERS = [
    grpo,
    bitsandbytes_adamw,
    all_parameters,
    an_empty_first_group,
    a_late_gradient,
    compiled_layers,
]


def of_the_probe(said: list[warnings.WarningMessage]) -> list[str]:
    """Its warnings, without that of dropout."""
    found = [str(w.message) for w in said if str(w.message).startswith("funcprobe:")]
    return [one for one in found if "dropout in training" not in one]


def probed_steps(trainer, checkpoint, monkeypatch):
    """Parameters before each step, and what was found of it; and all the warnings of the probe."""
    seen = []
    original = probe.probe_step

    def spy(policy, *rest):
        before = {n: t.double().clone() for n, t in policy.params.items()}
        seen.append((before, original(policy, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(probe, "probe_step", spy)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        probed = outcome(trainer).probed
    return seen, probed, of_the_probe(said)


@pytest.mark.parametrize("make", first(2, OPTIMIZERS))
def test_direction_is_the_step_that_is_taken(make, checkpoint, tmp_path, monkeypatch):
    """v of each step against the parameters before and after it, the first step among them."""
    trainer = make(checkpoint, tmp_path)
    seen, _, _ = probed_steps(trainer, checkpoint, monkeypatch)
    thetas = [before for before, _ in seen]
    thetas.append(
        {n: p.detach().double() for n, p in trainer.model.named_parameters() if n in thetas[0]}
    )
    assert len(thetas) == 4
    for (before, found), after in zip(seen, thetas[1:], strict=True):
        taken = {n: (after[n] - before[n]) / found.lr for n in before}
        v = {n: t.double() for n, t in found.direction.total.items()}
        for name, t in taken.items():  # rounding of theta in float32 over the last lr, 1e-2: 5e-6
            assert float((v[name] - t).norm()) <= 1e-4 * float(t.norm()), name
        assert tree.dot(v, taken) / tree.norm(v) / tree.norm(taken) > 0.999999


def two_groups_in_warm_up(checkpoint, folder, **settings):
    """As LoRA+ has them, B first: the registry's first name is in the second group."""
    settings = {"warmup_steps": 2, "max_grad_norm": 0.0} | settings
    trainer = plain_trainer(checkpoint, folder, **settings)
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in named.items() if "lora_B" in n], "lr": 4e-2},
        {"params": [p for n, p in named.items() if "lora_A" in n], "lr": 1e-2},
    ]
    assert "lora_A" in min(named)
    return with_adamw(trainer, groups)


@pytest.mark.slow
def test_warm_up_of_groups_is_probed_from_the_beginning(checkpoint, tmp_path, monkeypatch):
    """All learning rates are 0 in step 1: nothing moves, and the groups keep the ratio they will have.

    Step 1's direction against Adam's moments after it, the others' against what they did.
    """
    trainer = two_groups_in_warm_up(checkpoint, tmp_path / "one", max_steps=1)
    ((before, found),), (entry,), said = probed_steps(trainer, checkpoint, monkeypatch)
    assert said == []
    assert found.lr == 0
    assert entry["funcprobe/predicted"] == entry["funcprobe/measured"] == 0
    assert entry["funcprobe/derivative"] != 0
    assert not entry.keys() & {"funcprobe/ratio", "funcprobe/skipped"}
    optimizer = live.plain_optimizer(trainer.optimizer)
    for name, p in trainer.model.named_parameters():
        if not p.requires_grad:
            continue
        assert torch.equal(p.detach().double(), before[name])
        entry = {k: v.double() for k, v in optimizer.state[p].items()}
        assert entry["step"] == 1
        m, nu = entry["exp_avg"] / (1 - 0.9), entry["exp_avg_sq"] / (1 - 0.999)
        ratio = 1.0 if "lora_B" in name else 0.25
        v = -ratio * (m / (nu.sqrt() + 1e-8) + 0.1 * before[name])
        # The optimizer's moments are float32: relative 1e-7 each, of v's entries near 1.
        torch.testing.assert_close(
            found.direction.total[name].double(), v, rtol=1e-5, atol=1e-6, msg=name
        )

    monkeypatch.undo()
    trainer = two_groups_in_warm_up(checkpoint, tmp_path / "three")
    seen, probed, said = probed_steps(trainer, checkpoint, monkeypatch)
    assert said == []
    assert [found.lr for _, found in seen] == [0.0, 2e-2, 4e-2]
    assert [entry["step"] for entry in probed] == [1, 2, 3]
    after = {n: p.detach().double() for n, p in trainer.model.named_parameters() if p.requires_grad}
    for (before, found), end in zip(seen[1:], [seen[2][0], after], strict=True):
        for name in before:
            taken = (end[name] - before[name]) / found.lr
            v = found.direction.total[name].double()
            # Rounding of theta in float32 over an lr of 2e-2, or 5e-3 of A: 1e-5.
            assert float((v - taken).norm()) <= 1e-4 * float(taken.norm()), name


def test_logged_numbers_agree_with_each_other(checkpoint, tmp_path):
    trainer = dropped_out_grpo(checkpoint, tmp_path, learning_rate=1e-4, lr_scheduler_type="constant")
    config = probe_config(checkpoint, sampling={"B_E": 200})
    trainer.add_callback(ProbeCallback(trainer, every=1, config=config))
    for entry in outcome(trainer).probed:
        of = {k.removeprefix("funcprobe/"): v for k, v in entry.items()}
        assert of["predicted"] == pytest.approx(1e-4 * of["derivative"])
        shares = of["from_update"] + of["from_momentum"] + of["from_decay"]
        # Forward against reverse mode, in float32.
        assert shares == pytest.approx(of["predicted"], rel=1e-3, abs=1e-7)
        parts = [part for key, part in of.items() if key.startswith("from_projection/")]
        assert len(parts) == 3
        assert sum(parts) == pytest.approx(shares, rel=1e-5, abs=1e-9)
        assert of["momentum_share"] == pytest.approx(of["from_momentum"] / shares, rel=1e-5)
        assert of["top_layer"] in {0, 1}
        assert of["derivative_reverse"] == pytest.approx(of["derivative"], rel=1e-3, abs=1e-3)
        # At this lr the quadratic term is about a hundredth of the largest slopes seen here.
        assert of["measured"] == pytest.approx(of["predicted"], rel=0.02, abs=2e-5)
        assert of["ratio"] == pytest.approx(of["measured"] / of["predicted"])
        assert of["predicted_se_given_update"] > 0
        assert 190 < of["ess"] <= 200
        assert 0 < of["entropy"] < np.log(14)


def test_predictions_are_in_the_unit_of_the_step(checkpoint, tmp_path, monkeypatch):
    """Twice the learning rate is twice each predicted change, its standard error too."""
    found = []
    original = probe.probe_step
    monkeypatch.setattr(probe, "probe_step", lambda *a: found.append(original(*a)) or found[-1])
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    trainer.train()
    once, twice = (probe.numbers(found[0]._replace(lr=lr)) for lr in (0.25, 0.5))
    per_step = {k for k in once if k.startswith(("predicted", "from_"))}
    parts = {k for k in per_step if k.startswith("from_projection/")}
    assert len(per_step - parts) == 6
    assert len(parts) == 7
    assert all(twice[k] == 2 * once[k] for k in per_step)
    assert once["predicted_se_given_update"] > 0
    assert all(twice[k] == once[k] for k in once.keys() - per_step - {"ratio"})


@pytest.mark.slow
@pytest.mark.parametrize("what", ["base", "all"])
def test_half_precision_is_told_once_and_nothing_measured_is_logged(what, checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=2)
    for p in trainer.model.parameters():
        if what == "all" or not p.requires_grad:
            p.data = p.data.bfloat16()
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        probed = outcome(trainer).probed
    said = of_the_probe(said)
    assert "computes in torch.bfloat16, where rounding exceeds most measured changes" in said[0]
    assert len(said) == (2 if what == "all" else 1)
    if what == "all":
        assert "28 trainable tensors are in half precision" in said[1]
    assert [entry["step"] for entry in probed] == [1, 2]
    for entry in probed:
        assert not entry.keys() & {"funcprobe/measured", "funcprobe/ratio", "funcprobe/skipped"}
        assert entry["funcprobe/predicted"] != 0
        assert 11 < entry["funcprobe/ess"] <= 12


def test_gradients_are_widened_before_anything_is_summed():
    """A bfloat16 gradient in bfloat16 arithmetic would lose what clipping and moments need."""
    model = torch.nn.Linear(2, 2)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = model.to(dtype)
        model.weight.grad, model.bias.grad = torch.full_like(model.weight, 0.1), None
        found = live.ascent(model, dict(model.named_parameters()))
        assert found.keys() == {"weight"}
        assert found["weight"].dtype == wide
        assert torch.equal(found["weight"], -model.weight.grad.to(wide))


@pytest.mark.slow
def test_a_step_of_momentum_alone_is_probed(checkpoint, tmp_path):
    """Equal rewards from step 2 on: no gradient, and AdamW moves all the same."""
    calls = []

    def rewards(completions, **_):
        calls.append(1)
        return [float(len(c)) if len(calls) == 1 else 1.0 for c in completions]

    trainers = []
    for on in (False, True):
        calls.clear()
        trainer = dropped_out_grpo(checkpoint, tmp_path, rewards=rewards, max_steps=3)
        if on:
            trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
        trainers.append(outcome(trainer))
    require_same(*trainers)
    for entry in trainers[1].probed[1:]:
        assert entry["funcprobe/from_update"] == 0
        assert entry["funcprobe/predicted"] != 0


def test_a_step_that_moves_nothing_is_probed(checkpoint, tmp_path):
    """No gradient, no momentum, no decay: 0 is predicted and measured, and there is no ratio."""
    trainer = dropped_out_grpo(
        checkpoint,
        tmp_path,
        rewards=lambda completions, **_: [1.0] * len(completions),
        weight_decay=0.0,
    )
    trainer.add_callback(ProbeCallback(trainer, every=3, config=probe_config(checkpoint)))
    (entry,) = outcome(trainer).probed
    assert entry["funcprobe/predicted"] == 0
    assert entry["funcprobe/measured"] == 0
    assert "funcprobe/ratio" not in entry


def test_a_parameter_without_gradient_stays(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=2)
    trainer.train()
    policy = live.live_policy(trainer, 10**6)
    optimizer = live.plain_optimizer(trainer.optimizer)
    named = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
    without = sorted(named)[3]
    named[without].grad = None
    before = {n: p.detach().double().clone() for n, p in named.items()}
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    source = probe.load_eval(probe_config(checkpoint), policy)
    found = probe.probe_step(policy, optimizer, source, probe_config(checkpoint), 3)
    assert found.size.max_tokens == 4096  # by trials, of a tiny policy
    optimizer.step()
    for name, p in named.items():
        taken = (p.detach().double() - before[name]) / 1e-2
        torch.testing.assert_close(
            found.direction.total[name].double(), taken, rtol=1e-4, atol=3e-5, msg=name
        )
    assert not found.direction.total[without].any()
    assert torch.equal(named[without].detach().double(), before[without])


def test_a_step_that_cannot_be_probed_is_told_and_training_goes_on(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1)
    callback = ProbeCallback(trainer, every=1, config=probe_config(checkpoint))
    trainer.train()
    next(p for p in trainer.model.parameters() if p.requires_grad).grad = None
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, torch.nan) if p.requires_grad else None
    arguments = (trainer.args, trainer.state, trainer.control)
    with pytest.warns(
        UserWarning, match=r"step 2 is not probed: the gradient of .*lora_A.* is not finite"
    ):
        callback.on_pre_optimizer_step(*arguments, model=trainer.model, optimizer=trainer.optimizer)
    trainer.control.should_log = True
    callback.on_step_end(*arguments)
    assert trainer.state.log_history[-1]["funcprobe/skipped"] == 1
    assert trainer.control.should_log


def test_no_memory_for_the_probe_is_told(checkpoint, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(probe, "eval_passes", fail)
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    with pytest.warns(UserWarning, match=r"step 1 is not probed: CUDA out of memory\. Tried"):
        (entry,) = outcome(trainer).probed
    assert entry["funcprobe/skipped"] == 1
    assert trainer.state.global_step == 1


def test_other_processes_do_not_probe(checkpoint, tmp_path, monkeypatch):
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1)
    callback = ProbeCallback(trainer, every=1, config=probe_config(checkpoint))
    trainer.train()
    called = []

    def probed(*given):
        called.append(given)
        return SimpleNamespace(predicted=None, size="found")

    monkeypatch.setattr(probe, "probe_step", probed)
    monkeypatch.setattr(probe, "numbers", lambda _: {})
    monkeypatch.setattr(probe, "headline", lambda *_: "")
    given = {"model": trainer.model, "optimizer": trainer.optimizer}
    for is_zero, times in ((False, 0), (True, 1), (True, 2)):
        callback._numbers = None
        trainer.state.is_world_process_zero = is_zero
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, **given)
        assert len(called) == times
        assert (callback._numbers is not None) == is_zero
    assert [given[-1] for given in called] == [None, "found"]  # the size of microbatches, found once


def test_responses_end_where_the_trainers_do(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path)
    assert live.live_policy(trainer, 10**6).eos_ids == (1,)
    trainer.eos_token_ids = [1, 7]
    assert live.live_policy(trainer, 10**6).eos_ids == (1, 7)


def test_eval_rollouts_are_weighed_by_their_samplers_probabilities(checkpoint, tmp_path):
    """E as sampled at the start: no weight there, and an entropy that follows the policy after it."""
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=2, learning_rate=1e-2)
    policy = live.live_policy(trainer, 10**6)
    config = probe_config(checkpoint)
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(2, 14, (4,), generator=generator).tolist() for _ in range(10)]
    E = rollouts.Rollouts(
        prompt_index=[i // 2 for i in range(10)],
        prompt=[""] * 10,
        response=[""] * 10,
        prompt_ids=[[3 + i // 2, 4] for i in range(10)],
        response_ids=ids,
        finish_reason=["length"] * 10,
        temperature=1.0,
    )
    file = tmp_path / "eval.parquet"
    rollouts.save_rollouts(E, file)
    # Without a baseline, of which the entropy at another policy knows nothing.
    brings = probe_config(checkpoint, rollouts={"eval": str(file)}, entropy={"baseline": "none"})
    with pytest.raises(InputError, match="has no sampler_logp"):
        ProbeCallback(trainer, every=1, config=brings)
    with live.at_rest(policy.model):
        bound = funcprobe.bind(policy.model)
        stats = bound.token_stats(bound.params, rollouts.to_batch(E))
    rollouts.save_rollouts(E._replace(sampler_logp=stats.logp_NR.tolist()), file)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=brings))
    first, second = outcome(trainer).probed
    assert first["funcprobe/entropy"] == pytest.approx(float(stats.entropy_NR.mean()), rel=1e-6)
    moved = first["funcprobe/entropy"] + first["funcprobe/measured"]
    assert second["funcprobe/entropy"] == pytest.approx(moved, rel=1e-5)
    assert config.rollouts.eval is None
