"""A checkpoint on disk as the Trainer leaves it, and the configuration of a run on it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

# A checkpoint on disk as the Trainer leaves it, for the shell's tests.

PIECES = ("<pad>", "<eos>", *"0123456789+=")

REWARDS = """
def length(completions, **_):
    return [float(len(text)) for text in completions]

def equal(completions, **_):
    return [0.5] * len(completions)

def nan(completions, **_):
    return [float("nan")] * len(completions)

def short(completions, **_):
    return [1.0]

def raises(completions, **_):
    raise ZeroDivisionError("no such luck")
"""


class Checkpoint(NamedTuple):
    """Folders and files that a configuration names."""

    base: Path
    adapter: Path  # with tokenizer and optimizer.pt, so the folder of policy.checkpoint
    prompts: Path
    rewards: Path

    def settings(self) -> dict[str, Any]:
        """`--set` values of a run that takes about a second."""
        return {
            "policy.checkpoint": str(self.adapter),
            "policy.dtype": "float64",
            "optimizer.accept_positional": True,
            "prompts.source": str(self.prompts),
            "reward.function": f"{self.rewards}:length",
            "sampling.B_E": 12,
            "sampling.B_U": 4,
            "sampling.G": 3,
            "sampling.max_new_tokens": 6,
            "sampling.generation_batch": 8,
            "run.device": "cpu",
            "run.max_tokens": 2048,  # no trials, and results that are of one size on any machine
            "run.report": False,
        }


def character_tokenizer(pieces: Sequence[str] = PIECES) -> Qwen2Tokenizer:
    """A token a character; of the class that AutoTokenizer takes beside a Qwen2 model."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": None}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], **special)


def make_checkpoint(
    folder: Path,
    *,
    hidden: int = 16,
    layers: int = 2,
    pieces: Sequence[str] = PIECES,
    positions: int = 64,
    seed: int = 5,
) -> Checkpoint:
    """Qwen2 with a LoRA whose lora_B is random, after two real steps of AdamW."""
    found = Checkpoint(
        folder / "base", folder / "checkpoint-2", folder / "prompts.jsonl", folder / "rewards.py"
    )
    tokenizer = character_tokenizer(pieces)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(pieces),
                hidden_size=hidden,
                intermediate_size=24,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=positions,
                initializer_range=0.3,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=None,
            )
        )
        base.save_pretrained(found.base)
        lora = LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, lora)
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trainable, "weight_decay": 0.01}, {"params": [], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        for _ in range(2):
            tokens = torch.randint(2, len(pieces), (4, 8))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = str(found.base)
    model.save_pretrained(found.adapter, save_embedding_layers=False)
    for place in (found.base, found.adapter):
        tokenizer.save_pretrained(place)
    torch.save(optimizer.state_dict(), found.adapter / "optimizer.pt")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3, 6) for b in (4, 12)]
    found.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found.rewards.write_text(REWARDS, encoding="utf-8")
    return found


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def sets(settings: dict[str, Any]) -> list[str]:
    """Settings -> `--set` arguments; a string is quoted, so that no value is taken for another kind."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
