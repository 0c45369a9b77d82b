"""Callbacks inside transformers' Trainer and TRL's GRPOTrainer: what they write, log, leave alone."""

import json
import random
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from conftest import PIECES, Checkpoint, tiny_policy
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_trl import grpo_trainer
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import funcprobe
from funcprobe import InputError, tree
from funcprobe.adapters import rollouts
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.adapters.trainers import ParamNamesCallback, ProbeCallback, live, probe

TIMES = ("seconds", "runtime", "per_second", "step_time")


def probe_config(checkpoint: Checkpoint, **sections: Any) -> Config:
    small = {"B_E": 12, "max_new_tokens": 6, "generation_batch": 16}
    tables = {"prompts": {"source": str(checkpoint.prompts)}, "sampling": small}
    for name, table in sections.items():
        tables[name] = tables.get(name, {}) | table
    return Config.model_validate(tables)


def plain_trainer(checkpoint: Checkpoint, folder: Path, **settings: Any) -> Trainer:
    """transformers.Trainer on token ids, with dropout in base and adapter, and checkpointing."""
    model = tiny_policy(14, torch.float32, attention_dropout=0.1).train()
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleDict) and "default" in module:
            for part in module.children():
                if isinstance(part, torch.nn.Identity):
                    module["default"] = torch.nn.Dropout(0.2)
    # As peft and TRL do, one over the other: the first hook can then not be taken off by name.
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 14, (8,), generator=generator).tolist() for _ in range(32)]
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 3,
        "save_steps": 3,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "report_to": [],
        "disable_tqdm": True,
    } | settings
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint.base),
    )


def dropped_out_grpo(checkpoint: Checkpoint, folder: Path, **settings: Any) -> Any:
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    steps = {"max_steps": 3, "save_steps": 3, "learning_rate": 1e-3, "max_grad_norm": 0.5}
    return grpo_trainer(checkpoint, folder, dropout=0.2, **(batches | steps | settings))


TRAINERS = {"Trainer": plain_trainer, "GRPOTrainer": dropped_out_grpo}


class Outcome(types.SimpleNamespace):
    """Everything a training run ends in, to be equal bit by bit."""


def outcome(trainer: Trainer) -> Outcome:
    trainer.train()
    logs = [
        {k: v for k, v in entry.items() if not any(part in k for part in TIMES)}
        for entry in trainer.state.log_history
    ]
    return Outcome(
        weights={n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        adam=trainer.optimizer.state_dict(),
        scheduler=trainer.lr_scheduler.state_dict(),
        logs=[e for e in logs if not any(k.startswith("funcprobe/") for k in e)],
        probed=[e for e in logs if any(k.startswith("funcprobe/") for k in e)],
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch=torch.get_rng_state(),
    )


def require_same(a: Outcome, b: Outcome) -> None:
    assert a.weights.keys() == b.weights.keys()
    for name in a.weights:
        assert torch.equal(a.weights[name], b.weights[name]), name
    assert a.adam["param_groups"] == b.adam["param_groups"]
    for key, entry in a.adam["state"].items():
        for what, value in entry.items():
            assert torch.equal(value, b.adam["state"][key][what]), (key, what)
    assert a.scheduler == b.scheduler
    assert json.dumps(a.logs) == json.dumps(b.logs)
    assert a.python == b.python
    assert str(a.numpy) == str(b.numpy)
    assert torch.equal(a.torch, b.torch)


# ProbeCallback: training is left alone.


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", TRAINERS)
def test_training_is_the_same_bit_by_bit(kind, bf16, checkpoint, tmp_path):
    off = outcome(TRAINERS[kind](checkpoint, tmp_path / "off", bf16=bf16))
    trainer = TRAINERS[kind](checkpoint, tmp_path / "on", bf16=bf16)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    trainer.add_callback(ParamNamesCallback())
    on = outcome(trainer)
    require_same(off, on)
    steps = trainer.state.global_step
    assert [entry["step"] for entry in on.probed] == list(range(1, steps + 1))
    for entry in on.probed:
        assert np.isfinite([v for v in entry.values() if v is not None]).all()
    assert on.logs  # the trainer's own logging goes on beside the probe's
    # The comparison sees what a probe could do: one number drawn from the global state.
    spoiled = TRAINERS[kind](checkpoint, tmp_path / "spoiled", bf16=bf16)
    spoiled.add_callback(_DrawsOneNumber())
    with pytest.raises(AssertionError):
        require_same(off, outcome(spoiled))


class _DrawsOneNumber(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        torch.rand(1)


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_second_step_with_the_same_numbers(kind, checkpoint, tmp_path):
    found = []
    for every in (1, 2):
        trainer = TRAINERS[kind](checkpoint, tmp_path / str(every), max_steps=4)
        trainer.add_callback(ProbeCallback(trainer, every=every, config=probe_config(checkpoint)))
        found.append(outcome(trainer).probed)
    assert [entry["step"] for entry in found[1]] == [2, 4]
    assert found[1] == [entry for entry in found[0] if entry["step"] in {2, 4}]


def snapshot(model: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, by identity; containers with their content."""
    return {
        (name, key): (id(value), list(map(id, value.values())) if isinstance(value, dict) else value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


@pytest.mark.parametrize("raises", [False, True])
def test_at_rest_puts_everything_back(raises, checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1, bf16=True)
    trainer.train()  # accelerate has wrapped the forward, checkpointing is on
    model = trainer.model
    layers = model.get_base_model().model.layers
    layers[0].self_attn.eval()  # a mode of its own
    layers[1].compile(backend="eager")
    compiled = layers[1]._compiled_call_impl
    assert "_original_forward" in vars(model)
    hooks = model.get_input_embeddings()._forward_hooks
    assert len(hooks) > 1
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
    grads = {n: p.grad for n, p in model.named_parameters()}
    before, versions = snapshot(model), [p._version for p in model.parameters()]
    use_cache = model.config.use_cache
    draws = []
    for use in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        try:
            if use:
                with torch.autocast("cpu", torch.bfloat16), live.at_rest(model):
                    assert not torch.is_autocast_enabled("cpu")
                    assert not any(m.training for m in model.modules())
                    funcprobe.bind(model)  # refuses checkpointing, hooks and another forward
                    model.generate(input_ids=torch.tensor([[3, 4]]), do_sample=True, max_new_tokens=3)
                    random.random(), np.random.rand(), torch.rand(1)
                    1 // (not raises)
        except ZeroDivisionError:
            assert raises
        draws.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert draws[0] == draws[1]
    assert snapshot(model) == before
    assert layers[1]._compiled_call_impl is compiled is not None
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert model.config.use_cache == use_cache


def test_an_accelerators_random_state_is_put_back(monkeypatch):
    """Of its own kind, not CUDA's: as mps is, of which this machine has none."""
    states = {0: torch.tensor([1], dtype=torch.uint8), 1: torch.tensor([2], dtype=torch.uint8)}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "device_count", lambda: 2)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(
        torch.mps, "set_rng_state", lambda state, device: states.__setitem__(device, state)
    )
    cpu = torch.get_rng_state()
    with live.at_rest(tiny_policy(dtype=torch.float32)):
        states[1] = torch.tensor([9], dtype=torch.uint8)
        torch.rand(1)
    assert {device: int(state) for device, state in states.items()} == {0: 1, 1: 2}
    assert torch.equal(torch.get_rng_state(), cpu)


# ProbeCallback: the numbers.


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


def trainable(trainer: Trainer) -> list[torch.nn.Parameter]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


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
    return seen, probed, [str(w.message) for w in said if "funcprobe" in str(w.message)]


@pytest.mark.parametrize("make", OPTIMIZERS)
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
    assert len(per_step) == 5
    assert all(twice[k] == 2 * once[k] for k in per_step)
    assert once["predicted_se_given_update"] > 0
    assert all(twice[k] == once[k] for k in once.keys() - per_step - {"ratio"})


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
    said = [str(w.message) for w in said if str(w.message).startswith("funcprobe:")]
    assert "weights in torch.bfloat16, where rounding exceeds most measured changes" in said[0]
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
    monkeypatch.setattr(probe, "probe_step", lambda *a: called.append(a))
    monkeypatch.setattr(probe, "numbers", lambda _: {})
    given = {"model": trainer.model, "optimizer": trainer.optimizer}
    for is_zero, times in ((False, 0), (True, 1)):
        trainer.state.is_world_process_zero = is_zero
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, **given)
        assert len(called) == times
        assert (callback._numbers is not None) == is_zero


def test_responses_end_where_the_trainers_do(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path)
    assert live.live_policy(trainer, 10**6).eos_ids == (1,)
    trainer.eos_token_ids = [1, 7]
    assert live.live_policy(trainer, 10**6).eos_ids == (1, 7)


@pytest.fixture
def one_process():
    """A process group of one, as DistributedDataParallel and DTensor ask for."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_are_taken_off_in_any_order(one_process):
    model = tiny_policy(dtype=torch.float32)

    def compiled(module):
        return torch.compile(module, backend="eager")

    wraps = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel, compiled)
    for inner in wraps:
        assert live.policy_of(inner(model)) is model
        for outer in set(wraps) - {inner}:
            assert live.policy_of(outer(inner(model))) is model


def test_a_sharded_parameter_is_refused_by_name(one_process, checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path)
    optimizer = torch.optim.AdamW(trainable(trainer))
    live.require_live(trainer, optimizer)
    norm = trainer.model.get_base_model().model.norm
    mesh = init_device_mesh("cpu", (1,))
    norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.detach(), mesh))
    with pytest.raises(InputError, match=r"sharded \(NO, .*norm.weight is a DTensor\)"):
        live.require_live(trainer, optimizer)


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


# ProbeCallback: what is refused.


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"prompts": {"source": "toy"}}, 'prompts.source is "toy"'),
        ({"prompts": {"source": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"sampling": {"temperature": 0.5}}, "temperature 1 but E is at 0.5"),
        ({"optimizer": {"lr": 1e-3}}, r"optimizer\.lr is set"),
        ({"optimizer": {"max_grad_norm": 1.0}}, r"optimizer\.max_grad_norm is set.*the trainer's own"),
        ({"optimizer": {"rule": "sgd"}}, r"optimizer\.rule is set"),
        ({"rollouts": {"update": "u.parquet"}}, r"rollouts\.update is set"),
        ({"rollouts": {"eval": "nowhere.parquet"}}, r"nowhere\.parquet"),
        ({"policy": {"max_trainable": 10}}, r"more than policy\.max_trainable = 10"),
        ({"run": {"max_tokens": 8}}, r"a microbatch 8"),
    ],
)
def test_configurations_that_are_refused_before_training(sections, said, checkpoint, tmp_path):
    trainer = dropped_out_grpo(checkpoint, tmp_path)
    with pytest.raises(InputError, match=said) as error:
        ProbeCallback(trainer, every=1, config=probe_config(checkpoint, **sections))
    assert "\n" not in str(error.value)


def test_other_arguments_that_are_refused(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path)
    for every in (0, -1, True, 2.0, "2", None):
        with pytest.raises(InputError, match=f"every = {every!r}: a whole number"):
            ProbeCallback(trainer, every=every, config=probe_config(checkpoint))
    for config in ({}, None, 3):
        with pytest.raises(InputError, match=f"config is a {type(config).__name__}: the path"):
            ProbeCallback(trainer, every=1, config=config)
    with pytest.raises(InputError, match=r"none\.toml cannot be read"):
        ProbeCallback(trainer, every=1, config=tmp_path / "none.toml")
    trainer.processing_class = None
    with pytest.raises(InputError, match="no tokenizer"):
        ProbeCallback(trainer, every=1, config=probe_config(checkpoint))
    trainer = plain_trainer(checkpoint, tmp_path)
    trainer.model = trainer.model.get_base_model()
    with pytest.raises(InputError, match="Qwen2ForCausalLM, not a LoRA policy"):
        ProbeCallback(trainer, every=1, config=probe_config(checkpoint))
    small = {"vocab_size": len(PIECES), "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    classifier = Qwen2ForSequenceClassification(Qwen2Config(**small, **heads))
    trainer.model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(InputError, match="SequenceClassification, without an output embedding"):
        ProbeCallback(trainer, every=1, config=probe_config(checkpoint))


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adagrad"])
def test_other_optimizers_are_refused_before_the_first_step(optim, checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, optim=optim)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    with pytest.raises(InputError, match=r"the optimizer is [\w.]+, whose step need not be AdamW's"):
        trainer.train()
    assert trainer.state.global_step == 0


class Cautious(torch.optim.AdamW):
    """An AdamW that masks its gradients in step()."""


def test_what_is_not_quite_adamw_is_refused_before_the_first_step(checkpoint, tmp_path):
    def hook(*_):
        pass

    hooked = r"a step hook \(.*<locals>\.hook\)"
    for kind, settings, said in (
        (Cautious, {}, r"the optimizer is test_callbacks\.Cautious, whose step"),
        (torch.optim.AdamW, {"maximize": True}, "maximize = True"),
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad = True"),
        (torch.optim.AdamW, {}, hooked),
    ):
        trainer = plain_trainer(checkpoint, tmp_path)
        trainer.optimizer = kind(trainable(trainer), lr=1e-3, **settings)
        if said == hooked:
            trainer.optimizer.register_step_pre_hook(hook)
        trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
        with pytest.raises(InputError, match=said):
            trainer.train()
        assert trainer.state.global_step == 0
    plain = torch.optim.AdamW(trainable(trainer))
    for register in (
        plain.register_step_post_hook,
        register_optimizer_step_pre_hook,  # of every optimizer there is
        register_optimizer_step_post_hook,
    ):
        live.require_live(trainer, plain)
        handle = register(hook)
        with pytest.raises(InputError, match=hooked):
            live.require_live(trainer, plain)
        handle.remove()


def test_sharded_and_scaled_trainings_are_refused(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path)
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad])
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        sharded = types.SimpleNamespace(distributed_type=types.SimpleNamespace(value=kind), scaler=None)
        stand_in = types.SimpleNamespace(model=trainer.model, accelerator=sharded)
        with pytest.raises(InputError, match=rf"sharded \({kind}\)"):
            live.require_live(stand_in, optimizer)
    live.require_live(trainer, optimizer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    live.require_live(trainer, optimizer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(InputError, match="float16 with a GradScaler"):
        live.require_live(trainer, optimizer)


def test_an_optimizer_of_other_parameters_is_refused(checkpoint, tmp_path):
    """By name of the position, before the first step, by both callbacks."""
    for callback in ("names", "probe"):
        trainer = plain_trainer(checkpoint, tmp_path)
        trainable = [p for p in trainer.model.parameters() if p.requires_grad]
        foreign = torch.nn.Parameter(torch.zeros(2, 16))
        optimizer = torch.optim.AdamW([{"params": trainable[:2]}, {"params": [trainable[2], foreign]}])
        trainer.optimizer = optimizer
        trainer.add_callback(
            ParamNamesCallback()
            if callback == "names"
            else ProbeCallback(trainer, every=1, config=probe_config(checkpoint))
        )
        with pytest.raises(InputError, match="1 of group 1"):
            trainer.train()


# ParamNamesCallback.


def test_sidecar_of_a_grpo_run(checkpoint, tmp_path):
    trainer = dropped_out_grpo(checkpoint, tmp_path, temperature=0.9, top_p=0.95, epsilon=0.1)
    trainer.add_callback(ParamNamesCallback())
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    said = json.loads((folder / "optimizer_param_names.json").read_text())
    assert said["format"] == "funcprobe.optimizer_param_names"
    assert said["version"] == 1
    assert said["global_step"] == 3
    assert said["optimizer"] == "AdamW"
    assert said["max_grad_norm"] == 0.5
    trainable = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert said["groups"][0]["names"] == list(trainable)
    assert said["groups"][0]["shapes"] == [list(p.shape) for p in trainable.values()]
    assert said["groups"][1] == {"names": [], "shapes": []}
    assert said["versions"].keys() >= {"torch", "transformers", "peft", "trl"}
    assert said["versions"]["torch"] == torch.__version__
    loss, sampling = said["loss"], said["sampling"]
    assert (loss["loss_type"], loss["scale_rewards"], loss["beta"]) == ("dapo", "group", 0.0)
    assert (loss["epsilon"], loss["epsilon_high"], loss["num_iterations"]) == (0.1, 0.1, 1)
    assert (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (0.9, 0.95, 0)
    assert (sampling["num_generations"], sampling["max_completion_length"]) == (4, 6)
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]
    params = funcprobe.trainable_params(trainer.model)
    _, report = read_adam_state(folder / "optimizer.pt", trainer.model, params)
    assert not report.positional
    assert report.sidecar is not None


def test_sidecar_tells_groups_of_any_order(checkpoint, tmp_path):
    """An optimizer of the user's, in an order that no replay could guess."""
    trainer = plain_trainer(checkpoint, tmp_path, max_grad_norm=0)
    trainable = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    random.Random(4).shuffle(trainable)
    groups = [{"params": [p for _, p in part]} for part in (trainable[:5], trainable[5:])]
    trainer.optimizer = torch.optim.AdamW(groups, lr=1e-3)
    trainer.add_callback(ParamNamesCallback())
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    said = json.loads((folder / "optimizer_param_names.json").read_text())
    names = [n for n, _ in trainable]
    assert [group["names"] for group in said["groups"]] == [names[:5], names[5:]]
    assert said["max_grad_norm"] == 0
    params = funcprobe.trainable_params(trainer.model)
    state, _ = read_adam_state(folder / "optimizer.pt", trainer.model, params)
    for name, p in trainable:
        assert torch.equal(state.exp_avg[name], trainer.optimizer.state[p]["exp_avg"]), name


def test_no_sidecar_from_other_processes_and_plain_values_only(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.train()
    args = types.SimpleNamespace(should_save=False)
    given = {"model": trainer.model, "optimizer": trainer.optimizer}
    ParamNamesCallback().on_save(args, trainer.state, trainer.control, **given)
    args = types.SimpleNamespace(should_save=True, output_dir=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="it does not exist"):
        ParamNamesCallback().on_save(args, trainer.state, trainer.control, **given)
    args = types.SimpleNamespace(
        should_save=True,
        output_dir=str(tmp_path),
        max_grad_norm=float("inf"),
        beta=float("inf"),
        reward_weights=torch.tensor([1.0, 0.5]),
        loss_type=Path("x"),
        generation_kwargs={"stop": (1, None), 3: {"a": True}},
    )
    ParamNamesCallback().on_save(args, trainer.state, trainer.control, **given)
    said = json.loads((tmp_path / "checkpoint-1" / "optimizer_param_names.json").read_text())
    assert said["max_grad_norm"] == 0
    assert said["loss"] == {"loss_type": "x", "beta": "inf", "reward_weights": [1.0, 0.5]}
    assert said["sampling"] == {"generation_kwargs": {"stop": [1, None], "3": {"a": True}}}
