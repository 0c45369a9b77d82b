"""A small policy with every LoRA factor at work, and batches of random lengths."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, RobertaConfig, RobertaForCausalLM

import funcprobe

VOCABULARY = 11


def tiny_policy(
    vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float64, seed: int = 0, **config
):
    """A Qwen2 of two layers with LoRA on all linears, both LoRA factors random (B = 0 would hide A)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocabulary,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                initializer_range=0.3,
                **config,
            )
        )
        model = get_peft_model(
            base, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def random_batch(lengths, vocabulary: int = VOCABULARY, seed: int = 0) -> funcprobe.Batch:
    """One sequence per (prompt number, prompt length, response length)."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    prompts = {}
    for number, length, _ in lengths:
        prompts.setdefault(number, tokens(length))
    return funcprobe.collate(
        [prompts[number] for number, _, _ in lengths],
        [tokens(length) for _, _, length in lengths],
        [number for number, _, _ in lengths],
    )


def random_like(params: funcprobe.Params, seed: int = 1) -> funcprobe.Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for n, t in params.items()
    }


def of_shifted_positions() -> RobertaForCausalLM:
    """RoBERTa counts positions from its pad token's id on, generate() from 0 (transformers 5.23)."""
    config = RobertaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        is_decoder=True,
    )
    torch.manual_seed(0)
    model = RobertaForCausalLM(config).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model
