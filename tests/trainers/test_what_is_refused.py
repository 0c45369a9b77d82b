"""Trainings and configurations that the probe refuses, before the first step."""

import re
import types

import pytest
import torch
import torch.distributed
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import (
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from funcprobe import InputError
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.trainers import ParamNamesCallback, ProbeCallback, live
from support.checkpoints import PIECES
from support.policies import tiny_policy
from support.trainers import dropped_out_grpo, plain_trainer, probe_config, trainable


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


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"prompts": {"source": "toy", "prompt_column": "promt"}},
            "no column 'promt' .*answer, prompt",
        ),
        ({"prompts": {"source": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"sampling": {"eos_ids": [1]}}, r"sampling\.eos_ids is set"),
        ({"sampling": {"temperature": 0.5}}, "temperature 1 but E is at 0.5"),
        ({"optimizer": {"lr": 1e-3}}, r"optimizer\.lr is set"),
        ({"optimizer": {"max_grad_norm": 1.0}}, r"optimizer\.max_grad_norm is set.*the trainer's own"),
        ({"optimizer": {"rule": "sgd"}}, r"optimizer\.rule is set"),
        ({"step": {"masks": 2}}, r"step\.masks is set.*with its own masks"),
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
    with pytest.raises(InputError, match=r"no column 'prompt' .*input_ids, labels.*set prompts.s"):
        ProbeCallback(trainer, every=1, config=Config())
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(InputError, match="data set is IterableDataset, from which prompts cannot"):
        ProbeCallback(trainer, every=1, config=Config())
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
    with pytest.raises(InputError, match="Qwen2ForCausalLM with layers of an adapter"):
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
        (Cautious, {}, rf"the optimizer is {re.escape(Cautious.__module__)}\.Cautious, whose step"),
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
