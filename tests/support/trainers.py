"""Trainings of a small policy by transformers and by TRL, and everything that they end in."""

import json
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from funcprobe.adapters.config.schema import Config
from support.checkpoints import Checkpoint
from support.policies import tiny_policy

# Rounding of theta in float32 (|theta| under 1, so 6e-8) over lr = 5e-3 is 1e-5 per entry, of
# entries of v of order 1: a tenth of the bound of 1e-4, which has to hold what else differs.
LR, STEPS = 3e-2, 6  # linear to 0: step 6 is taken at LR / 6


def reward(completions, **_):
    """Spread like noise, so that groups differ, and better for what is short, so that lengths do."""
    return [sum(map(ord, text)) % 7 / 7 + (len(text) < 4) for text in completions]


def grpo_trainer(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dropout: float = 0.0,
    lora: Any = None,
    rewards: Any = reward,
    train_dataset: Any = None,
    **settings: Any,
) -> GRPOTrainer:
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "save_steps": STEPS - 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": LR,
        "weight_decay": 0.01,
        "report_to": [],
        "disable_tqdm": True,
    } | settings
    torch.manual_seed(0)  # of the LoRA weights
    lora = lora or LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    prompts = [json.loads(line) for line in checkpoint.prompts.read_text().splitlines()]
    return GRPOTrainer(
        model=base,
        reward_funcs=[rewards],
        args=GRPOConfig(**settings),
        train_dataset=train_dataset or Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(checkpoint.base),
        peft_config=lora,
    )


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


class TrainingOutcome(types.SimpleNamespace):
    """Everything a training run ends in, to be equal bit by bit."""


def outcome(trainer: Trainer) -> TrainingOutcome:
    trainer.train()
    logs = [
        {k: v for k, v in entry.items() if not any(part in k for part in TIMES)}
        for entry in trainer.state.log_history
    ]
    return TrainingOutcome(
        weights={n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        adam=trainer.optimizer.state_dict(),
        scheduler=trainer.lr_scheduler.state_dict(),
        logs=[e for e in logs if not any(k.startswith("funcprobe/") for k in e)],
        probed=[e for e in logs if any(k.startswith("funcprobe/") for k in e)],
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch=torch.get_rng_state(),
    )


def require_same(a: TrainingOutcome, b: TrainingOutcome) -> None:
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


def trainable(trainer: Trainer) -> list[torch.nn.Parameter]:
    return [p for p in trainer.model.parameters() if p.requires_grad]
