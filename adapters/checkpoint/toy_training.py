"""The toy's training: policy-gradient steps of an adapter, checkpoints as the Trainer saves them."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..optimizer import sidecar
from ..optimizer.names import sidecar_content

Rows: TypeAlias = list[dict[str, str]]  # {"prompt": "12+7=", "answer": "19"}
Report: TypeAlias = Callable[[str], None]

MAX_NEW_TOKENS = 16
"""Enough for the longest response taught ("120+18=138" to 69+69, and the EOS) and for a few errors."""

MAX_GRAD_NORM = 1.0


class Trained(NamedTuple):
    """What a checkpoint is made of."""

    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    state: Any  # the Trainer's


Save: TypeAlias = Callable[[Trained], None]


def clipped_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One clipped step; the norm of the gradient before clipping."""
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item()
    optimizer.step()
    optimizer.zero_grad()
    return norm


class Samples(NamedTuple):
    """Responses to every prompt."""

    tokens_NL: Tensor  # prompt, response, padding; eight consecutive rows per prompt
    response_NL: Tensor  # 1 at the response's tokens, the EOS included, else 0
    reward_N: Tensor  # 1 if the last number is the answer, else 0


def sample(model: Any, tokenizer: Any, prompts: Rows) -> Samples:
    """Eight responses to each prompt, at temperature 1."""
    rows = [row for row in prompts for _ in range(8)]
    texts = [row["prompt"] for row in rows]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    tokens_NL = model.generate(**inputs, **sampling, max_new_tokens=MAX_NEW_TOKENS)
    response_NR = tokens_NL[:, inputs.input_ids.shape[1] :]
    found = [re.findall(r"\d+", text) for text in tokenizer.batch_decode(response_NR)]
    reward_N = torch.tensor(
        [float(numbers[-1:] == [row["answer"]]) for numbers, row in zip(found, rows, strict=True)]
    )
    eos_NR = (response_NR == tokenizer.eos_token_id).long()
    before_NR = eos_NR.cumsum(dim=1) - eos_NR
    response_NL = torch.cat([torch.zeros_like(inputs.input_ids), (before_NR == 0).long()], dim=1)
    # With right padding, causal attention needs no mask.
    left_N1 = (1 - inputs.attention_mask).sum(dim=1, keepdim=True)
    index_NL = (torch.arange(tokens_NL.shape[1]) + left_N1) % tokens_NL.shape[1]
    return Samples(tokens_NL.gather(1, index_NL), response_NL.gather(1, index_NL), reward_N)


def train_adapter(
    base: Any, tokenizer: Any, prompts: Rows, steps: int, report: Report, save: Save
) -> None:
    """Policy-gradient steps of a new adapter; `save` is called after each."""
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerState, get_scheduler

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft uses a deprecated attribute of transformers 5.23
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, lora).eval()
    # The Trainer's two groups; LoRA has neither biases nor norms, so that the second is empty.
    decay = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": [], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    # Twice the steps taken, as if in mid-run: at the end of a linear schedule the next lr is 0.
    state = TrainerState(max_steps=2 * steps, logging_steps=1, train_batch_size=128)
    scheduler = get_scheduler("linear", optimizer, 0, state.max_steps)
    steps_per_epoch = len(prompts) // 16
    state.num_train_epochs = -(-state.max_steps // steps_per_epoch)
    for step in range(steps):
        at = step % steps_per_epoch * 16  # the prompts are in random order already
        lr = scheduler.get_last_lr()[0]
        log = _policy_step(model, tokenizer, prompts[at : at + 16], optimizer)
        scheduler.step()
        state.global_step, state.epoch = step + 1, (step + 1) / steps_per_epoch
        log |= {"learning_rate": lr, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(log)
        report("toy: policy step {step}, reward {reward:.2f}, entropy {entropy:.2f}".format(**log))
        save(Trained(model, optimizer, scheduler, state))


def save_checkpoint(trained: Trained, tokenizer: Any, base: Path, folder: Path) -> None:
    """As the Trainer and record_rollouts write it, the adapter on `base`."""
    model, optimizer, scheduler, state = trained
    lora = model.peft_config["default"]
    lora.base_model_name_or_path = str(base)
    lora.target_modules = sorted(lora.target_modules)  # a set, whose order varies between processes
    # "auto" would look for that base, and then on the hub, to compare vocabularies.
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    names = sidecar_content(
        optimizer,
        model,
        ("torch", "transformers", "peft"),
        global_step=state.global_step,
        max_grad_norm=MAX_GRAD_NORM,
        loss={"loss_type": "dapo"},
        sampling={"temperature": 1.0, "num_generations": 8, "max_completion_length": MAX_NEW_TOKENS},
    )
    (folder / sidecar.FILE).write_text(json.dumps(names, indent=1), encoding="utf-8")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    state.save_to_json(str(folder / "trainer_state.json"))


def _policy_step(
    model: Any, tokenizer: Any, prompts: Rows, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One step of descent of -sum A l / (number of tokens); its log entries, by TRL's names."""
    tokens_NL, response_NL, reward_N = sample(model, tokenizer, prompts)
    reward_BG = reward_N.view(len(prompts), -1)
    mean_B1, std_B1 = reward_BG.mean(dim=1, keepdim=True), reward_BG.std(dim=1, keepdim=True)
    advantage_N1 = ((reward_BG - mean_B1) / (std_B1 + 1e-4)).view(-1, 1)
    logits_NLV = model(input_ids=tokens_NL, use_cache=False).logits[:, :-1]
    logp_NLV = logits_NLV.log_softmax(dim=-1)
    logp_NL = logp_NLV.gather(-1, tokens_NL[:, 1:, None]).squeeze(-1)
    mask_NL = response_NL[:, 1:]
    loss = -(advantage_N1 * logp_NL * mask_NL).sum() / mask_NL.sum()
    entropy_NL = -(logp_NLV.exp() * logp_NLV).sum(dim=-1).detach()
    return {
        "loss": loss.item(),
        "grad_norm": clipped_step(optimizer, loss),
        "reward": reward_N.mean().item(),
        "frac_reward_zero_std": (std_B1 == 0).float().mean().item(),
        "completions/mean_length": mask_NL.sum().item() / len(mask_NL),
        "entropy": ((entropy_NL * mask_NL).sum() / mask_NL.sum()).item(),
    }
