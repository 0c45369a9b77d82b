"""Callbacks inside transformers' Trainer and TRL's GRPOTrainer: what they write, log, leave alone."""

import json
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Checkpoint, tiny_policy
from datasets import Dataset
from test_trl import grpo_trainer
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import funcprobe
from funcprobe import InputError, tree
from funcprobe.adapters import rollouts
from funcprobe.adapters.config import Config
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
    next(model.get_base_model().model.layers.children()).self_attn.eval()  # a mode of its own
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
                with live.at_rest(model):
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
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert model.config.use_cache == use_cache


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


def test_direction_is_the_step_that_is_taken(checkpoint, tmp_path, monkeypatch):
    """v of each step against the parameters before and after it, the first step among them."""
    seen = []
    original = probe.probe_step

    def spy(policy, *rest):
        before = {n: t.double().clone() for n, t in policy.params.items()}
        found = original(policy, *rest)
        seen.append((before, found))
        return found

    monkeypatch.setattr(probe, "probe_step", spy)
    trainer = dropped_out_grpo(checkpoint, tmp_path, learning_rate=3e-2)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    trainer.train()
    thetas = [before for before, _ in seen]
    thetas.append(
        {n: p.detach().double() for n, p in trainer.model.named_parameters() if n in thetas[0]}
    )
    assert len(thetas) == 4
    for (before, found), after in zip(seen, thetas[1:], strict=True):
        taken = {n: (after[n] - before[n]) / found.lr for n in before}
        v = {n: t.double() for n, t in found.direction.total.items()}
        for name, t in taken.items():  # rounding of theta in float32 over the last lr, 1e-2: 5e-6
            assert float((v[name] - t).norm() / t.norm()) < 1e-4, name
        assert tree.dot(v, taken) / tree.norm(v) / tree.norm(taken) > 0.999999


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
    brings = probe_config(checkpoint, rollouts={"eval": str(file)})
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
        ({"sampling": {"temperature": 0.5}}, "temperature 1 and E is at 0.5"),
        ({"optimizer": {"lr": 1e-3}}, r"optimizer\.lr is set"),
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
    with pytest.raises(InputError, match="every = 0"):
        ProbeCallback(trainer, every=0, config=probe_config(checkpoint))
    with pytest.raises(InputError, match=r"none\.toml cannot be read"):
        ProbeCallback(trainer, every=1, config=tmp_path / "none.toml")
    trainer.processing_class = None
    with pytest.raises(InputError, match="no tokenizer"):
        ProbeCallback(trainer, every=1, config=probe_config(checkpoint))
    trainer = plain_trainer(checkpoint, tmp_path)
    trainer.model = trainer.model.get_base_model()
    with pytest.raises(InputError, match="Qwen2ForCausalLM, not a LoRA policy"):
        ProbeCallback(trainer, every=1, config=probe_config(checkpoint))


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adagrad"])
def test_other_optimizers_are_refused_before_the_first_step(optim, checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, optim=optim)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    with pytest.raises(InputError, match=r"the optimizer is \w+, whose step is not AdamW's"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_sharded_and_scaled_trainings_are_refused(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path)
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad])
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        sharded = types.SimpleNamespace(distributed_type=types.SimpleNamespace(value=kind), scaler=None)
        stand_in = types.SimpleNamespace(model=trainer.model, accelerator=sharded)
        with pytest.raises(InputError, match=rf"sharded \({kind}\)"):
            live.require_live(stand_in, optimizer)
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
    with pytest.raises(InputError, match="no such folder"):
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
