"""Policies of several classes, built in memory."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from support.policies import random_batch, tiny_policy

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GPT2 = {
    "vocab_size": 11,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.3,
}


def with_lora(base, dtype, targets="all-linear", **lora):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", **lora)
    model = get_peft_model(base, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def llama(dtype):
    return with_lora(LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)), dtype)


def gemma2(dtype):
    # A cap of 0.8 bends logits of this size visibly; the true 30 would hardly.
    config = Gemma2Config(
        **SHAPE, head_dim=8, final_logit_softcapping=0.8, attn_implementation="eager", sliding_window=4
    )
    return with_lora(Gemma2ForCausalLM(config), dtype)


def gpt2(dtype):
    return with_lora(
        GPT2LMHeadModel(GPT2Config(**GPT2)), dtype, ["c_attn", "c_fc"], fan_in_fan_out=True
    )


def llama_with_lora_on_the_head(dtype):
    return with_lora(LlamaForCausalLM(LlamaConfig(**SHAPE)), dtype, ["q_proj", "lm_head"])


def llama_with_a_trainable_head(dtype):
    return with_lora(
        LlamaForCausalLM(LlamaConfig(**SHAPE)), dtype, ["v_proj"], modules_to_save=["lm_head"]
    )


def qwen2(dtype):
    return tiny_policy(dtype=dtype)


def llama_with_tied_tokens(dtype):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    return with_lora(base, dtype, ["v_proj"], trainable_token_indices=[3, 7])


def llama_with_a_tied_trainable_head(dtype):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    saved = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    return with_lora(base, dtype, ["v_proj"], **saved)


BUILDERS = [
    qwen2,
    llama,
    gemma2,
    gpt2,
    llama_with_lora_on_the_head,
    llama_with_a_trainable_head,
    llama_with_tied_tokens,
    llama_with_a_tied_trainable_head,
]


def built(build, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = build(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # rejected where the table is trained
    return model


BATCH = random_batch([(0, 3, 4), (1, 5, 1), (2, 1, 6), (0, 3, 2)])
