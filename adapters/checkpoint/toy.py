"""A small policy trained at first use, so that a first run needs no network.

A Qwen2 of a third of a million parameters learns addition by supervised steps, then a LoRA adapter is
trained by policy gradient and saved as by the Hugging Face Trainer in the middle of a run. It is read
by the same code as any other checkpoint.
"""

import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from platformdirs import user_cache_path

from funcprobe.types import InputError

from ..machine.devices import random_state_kept
from .toy_training import (
    Report,
    Rows,
    Trained,
    clipped_step,
    sample,
    save_checkpoint,
    train_adapter,
)

VERSION = "4"
"""Part of the default folder's name: raise it with every change of the files written."""

SAVE_STEPS = 4
"""Steps between the checkpoints of `ensure_toy_training`."""


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
    save_steps: int | None = None  # checkpoints; None: the last step alone


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


def ensure_toy_training(report: Report = lambda _: None) -> Toy:
    """The same training with a checkpoint every four of its steps, in the user's cache."""
    folder = user_cache_path("funcprobe") / f"toy-{VERSION}-every-{SAVE_STEPS}"
    return ensure_toy(folder, report, Recipe(save_steps=SAVE_STEPS))


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
    tokenizer.save_pretrained(toy.base)

    def save(trained: Trained) -> None:
        step = trained.state.global_step
        if step % (recipe.save_steps or recipe.policy_steps) == 0 or step == recipe.policy_steps:
            # The base by its final place, not its temporary one.
            folder = toy.checkpoint.with_name(f"checkpoint-{step}")
            save_checkpoint(trained, tokenizer, final_base, folder)

    train_adapter(base, tokenizer, prompts, recipe.policy_steps, report, save)
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
        clipped_step(optimizer, loss)
        if step % 25 == 0:
            asked = _draw_prompts(rng, 32, recipe.largest)
            accuracy = sample(model, tokenizer, asked).reward_N.mean().item()
            report(f"toy: supervised step {step}, loss {loss.item():.2f}, accuracy {accuracy:.2f}")
            if accuracy >= recipe.accuracy:
                break
    return model
