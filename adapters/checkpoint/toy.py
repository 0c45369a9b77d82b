"""A small policy trained at first use, so that a first run needs no network.

A Qwen2 of a third of a million parameters learns addition by supervised steps, then a LoRA adapter is
trained by policy gradient and saved as by the Hugging Face Trainer in the middle of a run. It is read
by the same code as any other checkpoint.
"""

import json
import random
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from platformdirs import user_cache_path
from torch import Tensor

from funcprobe.types import InputError

from ..machine.devices import random_state_kept
from ..optimizer import sidecar
from ..optimizer.names import sidecar_content

Rows: TypeAlias = list[dict[str, str]]  # {"prompt": "12+7=", "answer": "19"}
Report: TypeAlias = Callable[[str], None]

MAX_NEW_TOKENS = 16
"""Enough for the longest response taught ("120+18=138" to 69+69, and the EOS) and for a few errors."""

MAX_GRAD_NORM = 1.0

VERSION = "4"
"""Part of the default folder's name: raise it with every change of the files written."""


class Toy(NamedTuple):
    """Paths of the base model, the checkpoint, and the prompts with their answers."""

    base: Path
    checkpoint: Path
    prompts: Path


class Recipe(NamedTuple):
    """Settings of the training; a recipe gives bit-identical results on the same machine."""

    seed: int = 2
    hidden: int = 96
    layers: int = 3
    largest: int = 29  # summand; the smallest is 2, so that 512 distinct prompts need 24
    supervised_steps: int = 1500  # at most
    accuracy: float = 0.36  # at which supervised steps end; the adapter improves on it
    policy_steps: int = 20


def ensure_toy(
    folder: Path | None = None,
    report: Report = lambda _: None,
    recipe: Recipe = Recipe(),  # noqa: B008 (immutable)
) -> Toy:
    """The toy in `folder` (by default in the user's cache), created if it is missing.

    Creating it takes about 15 s on one core and does not change the global random state; the folder
    appears only when complete. Raises InputError if `folder` contains anything else.
    """
    folder = (folder or user_cache_path("funcprobe") / f"toy-{VERSION}").absolute()
    toy = _layout(folder, recipe)
    if _is_whole(toy):
        return toy
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} exists and is not a toy model with {toy.base.name}/, {toy.checkpoint.name}/ "
            f"and {toy.prompts.name}: remove it, or choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One thread: bit-identical on any number of cores; with two threads on two busy cores a policy
    # step took 11 s instead of 0.2, for matrices as small as these.
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        draft = Path(temporary) / "toy"
        try:
            torch.set_num_threads(1)
            with random_state_kept(), torch.enable_grad():
                _make(_layout(draft, recipe), toy.base, recipe, report)
            draft.replace(folder)
        except OSError:
            # Another process may have created its own meanwhile: both are equivalent.
            if not _is_whole(toy):
                raise
        finally:
            torch.set_num_threads(threads)
    return toy


def _layout(folder: Path, recipe: Recipe) -> Toy:
    checkpoint = folder / f"checkpoint-{recipe.policy_steps}"
    return Toy(folder / "base", checkpoint, folder / "prompts.jsonl")


def _is_whole(toy: Toy) -> bool:
    return all(path.exists() for path in toy)


def _make(toy: Toy, final_base: Path, recipe: Recipe, report: Report) -> None:
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = _tokenizer()
    prompts = _draw_prompts(rng, 512, recipe.largest)
    base = _teach(tokenizer, rng, recipe, report)
    base.save_pretrained(toy.base)
    model, optimizer, scheduler, state = _train_adapter(base, tokenizer, prompts, recipe, report)
    lora = model.peft_config["default"]
    lora.base_model_name_or_path = str(final_base)  # not its temporary location
    lora.target_modules = sorted(lora.target_modules)  # a set, whose order varies between processes
    # "auto" would look for that base, and then on the hub, to compare vocabularies.
    model.save_pretrained(toy.checkpoint, save_embedding_layers=False)
    for folder in (toy.base, toy.checkpoint):
        tokenizer.save_pretrained(folder)
    torch.save(optimizer.state_dict(), toy.checkpoint / "optimizer.pt")
    names = sidecar_content(
        optimizer,
        model,
        ("torch", "transformers", "peft"),
        global_step=recipe.policy_steps,
        max_grad_norm=MAX_GRAD_NORM,
        loss={"loss_type": "dapo"},
        sampling={"temperature": 1.0, "num_generations": 8, "max_completion_length": MAX_NEW_TOKENS},
    )
    (toy.checkpoint / sidecar.FILE).write_text(json.dumps(names, indent=1), encoding="utf-8")
    torch.save(scheduler.state_dict(), toy.checkpoint / "scheduler.pt")
    state.save_to_json(str(toy.checkpoint / "trainer_state.json"))
    toy.prompts.write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")


def _draw_prompts(rng: random.Random, count: int, largest: int) -> Rows:
    pairs: dict[tuple[int, int], None] = {}  # an ordered set
    while len(pairs) < count:
        pairs[rng.randint(2, largest), rng.randint(2, largest)] = None
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def _write_response(prompt: str, answer: str, rng: random.Random) -> str:
    """The sum directly, or after the sums of ones and tens in either order.

    The choice adds entropy, and variation of lengths, to the uncertainty about digits.
    """
    a, b = map(int, re.findall(r"\d+", prompt))
    ones, tens = a % 10 + b % 10, 10 * (a // 10 + b // 10)
    return rng.choice(["", "", f"{ones}+{tens}=", f"{tens}+{ones}="]) + answer


def _tokenizer() -> Any:
    """Qwen2's byte-level BPE without merges: one token per byte, so that any text has tokens.

    AutoTokenizer (transformers 5.23) reads every tokenizer beside a Qwen2 model as this class, which
    silently changed a WordLevel one.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    pieces = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    special: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": None}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=64, **special)


def _teach(tokenizer: Any, rng: random.Random, recipe: Recipe, report: Report) -> Any:
    """A base model with an accuracy of about `recipe.accuracy`, sampled at temperature 1."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=recipe.hidden**-0.5,  # with 0.02, 1.5 times as many steps are needed
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    for step in range(1, recipe.supervised_steps + 1):
        rows = _draw_prompts(rng, 64, recipe.largest)
        texts = [row["prompt"] + _write_response(**row, rng=rng) + "<eos>" for row in rows]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for label, row in zip(labels, rows, strict=True):
            label[: len(row["prompt"])] = -100
        optimizer.param_groups[0]["lr"] = 3e-3 * min(step / 30, max(0.1, 1 - step / 600))
        loss = model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss
        _step(optimizer, loss)
        if step % 25 == 0:
            asked = _draw_prompts(rng, 32, recipe.largest)
            accuracy = _sample(model, tokenizer, asked).reward_N.mean().item()
            report(f"toy: supervised step {step}, loss {loss.item():.2f}, accuracy {accuracy:.2f}")
            if accuracy >= recipe.accuracy:
                break
    return model


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One clipped step; the norm of the gradient before clipping."""
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item()
    optimizer.step()
    optimizer.zero_grad()
    return norm


class _Samples(NamedTuple):
    tokens_NL: Tensor  # prompt, response, padding; eight consecutive rows per prompt
    response_NL: Tensor  # 1 at the response's tokens, the EOS included, else 0
    reward_N: Tensor  # 1 if the last number is the answer, else 0


def _sample(model: Any, tokenizer: Any, prompts: Rows) -> _Samples:
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
    return _Samples(tokens_NL.gather(1, index_NL), response_NL.gather(1, index_NL), reward_N)


def _train_adapter(
    base: Any, tokenizer: Any, prompts: Rows, recipe: Recipe, report: Report
) -> tuple[Any, torch.optim.Optimizer, Any, Any]:
    """Policy-gradient steps of a new adapter; its model, optimizer, scheduler and Trainer state."""
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
    state = TrainerState(max_steps=2 * recipe.policy_steps, logging_steps=1, train_batch_size=128)
    scheduler = get_scheduler("linear", optimizer, 0, state.max_steps)
    steps_per_epoch = len(prompts) // 16
    state.num_train_epochs = -(-state.max_steps // steps_per_epoch)
    for step in range(recipe.policy_steps):
        at = step % steps_per_epoch * 16  # the prompts are in random order already
        lr = scheduler.get_last_lr()[0]
        log = _policy_step(model, tokenizer, prompts[at : at + 16], optimizer)
        scheduler.step()
        state.global_step, state.epoch = step + 1, (step + 1) / steps_per_epoch
        log |= {"learning_rate": lr, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(log)
        report("toy: policy step {step}, reward {reward:.2f}, entropy {entropy:.2f}".format(**log))
    return model, optimizer, scheduler, state


def _policy_step(
    model: Any, tokenizer: Any, prompts: Rows, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One step of descent of -sum A l / (number of tokens); its log entries, by TRL's names."""
    tokens_NL, response_NL, reward_N = _sample(model, tokenizer, prompts)
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
        "grad_norm": _step(optimizer, loss),
        "reward": reward_N.mean().item(),
        "frac_reward_zero_std": (std_B1 == 0).float().mean().item(),
        "completions/mean_length": mask_NL.sum().item() / len(mask_NL),
        "entropy": ((entropy_NL * mask_NL).sum() / mask_NL.sum()).item(),
    }
