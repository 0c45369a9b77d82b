"""A small LoRA policy, and a Trainer's run that leaves its optimizer's state."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from funcprobe.types import Params

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"modules_to_save": ["norm"]},  # the Trainer's no-decay group is not empty
    "bias": {"lora_bias": True},
}


def make_model(
    adapter: str = "plain", seed: int = 0, *, hidden_size: int = 16, r: int = 2
) -> torch.nn.Module:
    """A Qwen2 of two layers with LoRA on three of their linears, both factors random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=11,
            hidden_size=hidden_size,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
        lora = LoraConfig(
            r=r,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            **ADAPTERS[adapter],
        )
        return get_peft_model(Qwen2ForCausalLM(config), lora)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def registry(model: torch.nn.Module) -> Params:
    """A copy, sorted by name as `bind` has it."""
    return {n: p.detach().clone() for n, p in sorted(trainable(model).items())}


def trainer_run(
    model: torch.nn.Module, folder: Path, steps: int = 2, **settings: Any
) -> torch.optim.Optimizer:
    """The optimizer after a Trainer's run, whose last step is saved as folder/checkpoint-`steps`."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=steps,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    rows = [{"input_ids": [1, 2, 3, k], "labels": [1, 2, 3, k]} for k in (4, 5, 6, 7)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return trainer.optimizer.optimizer
