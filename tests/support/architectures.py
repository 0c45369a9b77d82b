"""The architectures and the adapters that are supported, small, and policies of them on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import funcprobe
from funcprobe.policy.forward import frozen_forward, trainable_params
from funcprobe.policy.layout import microbatches
from support.checkpoints import PIECES, character_tokenizer
from support.policies import random_batch, random_like

CPU = torch.device("cpu")
BATCH = random_batch([(0, 3, 4), (1, 5, 3), (2, 1, 6), (0, 3, 2)], vocabulary=len(PIECES))
MASK_NR = funcprobe.response_mask(BATCH)
P_NR = random_like({"p": MASK_NR.double()}, seed=2)["p"] * MASK_NR
Q_NR = random_like({"q": MASK_NR.double()}, seed=3)["q"] * MASK_NR

SHAPE: dict[str, Any] = {
    "vocab_size": len(PIECES),
    "hidden_size": 32,  # in 4 bits a block of 64 numbers has one scale
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
# A window shorter than the sequences, and caps that bend activations of this size visibly.
GEMMA = {"head_dim": 16, "sliding_window": 4}
GEMMA2 = GEMMA | {"final_logit_softcapping": 0.8, "attn_logit_softcapping": 0.9}
GEMMA3 = GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {
    "vocab_size": len(PIECES),
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}

ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "qwen2": lambda **tie: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **tie)),
    "llama": lambda **tie: LlamaForCausalLM(LlamaConfig(**SHAPE, **tie)),
    "gemma": lambda **tie: GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=16, **tie)),
    "gemma2": lambda **tie: Gemma2ForCausalLM(Gemma2Config(**SHAPE, **GEMMA2, **tie)),
    "gemma3": lambda **tie: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **GEMMA3, **tie)),
    "mistral": lambda **tie: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None, **tie)),
    "mistral-window": lambda **tie: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4, **tie)),
    "gpt2": lambda **tie: GPT2LMHeadModel(GPT2Config(**GPT2, **tie)),
}

# {placeholder}: a module's name, which is another in GPT-2.
MODULES = {"attn": "q_proj", "mlp": "down_proj", "embed": "embed_tokens", "norm": "norm"}
GPT2_MODULES = {"attn": "c_attn", "mlp": "c_fc", "embed": "wte", "norm": "ln_f"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["{attn}", "{mlp}"],
        "rank_pattern": {"{mlp}": 3},
        "alpha_pattern": {"{attn}": 7},
    },
    "trained-norms": {"target_modules": ["{attn}"], "modules_to_save": ["{norm}"]},
    "lora-head": {"target_modules": ["{attn}", "lm_head"]},
    "trained-head": {"target_modules": ["{attn}"], "modules_to_save": ["lm_head"]},
    "lora-embedding": {"target_modules": ["{attn}", "{embed}"]},
    "trained-embedding": {"target_modules": ["{attn}"], "modules_to_save": ["{embed}"]},
    "trained-tokens": {"target_modules": ["{attn}"], "trainable_token_indices": [3, 7]},
    "lora-bias": {"target_modules": ["{attn}"], "lora_bias": True},
    "trained-biases": {"target_modules": ["{attn}"], "bias": "all"},
    "biases-of-lora": {"target_modules": ["{attn}"], "bias": "lora_only"},
}
# The embedding, or its twin the head, takes part: with tied and with untied weights.
TIED = {"lora-head", "trained-head", "lora-embedding", "trained-embedding", "trained-tokens"}
CASES = [
    (architecture, adapter, tied)
    for architecture in ARCHITECTURES
    for adapter in ADAPTERS
    for tied in ((False, True) if adapter in TIED else (False,))
]


def case_id(case: tuple[str, str, bool]) -> str:
    architecture, adapter, tied = case
    return f"{architecture}-{adapter}{'-tied' * tied}"


def save_base(architecture: str, folder: Path, *, tied: bool = False, seed: int = 3) -> Path:
    """A base of random weights, biases among them, with a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = ARCHITECTURES[architecture](tie_word_embeddings=tied)
        for name, p in base.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.2)
    base.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def lora_config(architecture: str, adapter: str, **more: Any) -> LoraConfig:
    names = GPT2_MODULES if architecture == "gpt2" else MODULES

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.format(**names)
        if isinstance(value, list):
            return [filled(v) for v in value]
        return {filled(k): v for k, v in value.items()} if isinstance(value, dict) else value

    return LoraConfig(
        r=2,
        lora_alpha=5,
        task_type="CAUSAL_LM",
        fan_in_fan_out=architecture == "gpt2",
        **{k: filled(v) for k, v in ADAPTERS.get(adapter, {}).items()},
        **more,
    )


def save_adapter(base: Any, config: Any, base_folder: Path, folder: Path) -> PeftModel:
    """What a trainer leaves after some steps: every trained tensor has moved, lora_B with them."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = get_peft_model(base, config)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
    model.peft_config["default"].base_model_name_or_path = str(base_folder)
    model.save_pretrained(folder)
    return model


def same_shapes_logits(model: Any, reference: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(bound model's, reference's) logits [N, L, V] at every position of BATCH, responses among them.

    A matrix product may round differently with another number of rows, and the core hands response
    tokens alone to the head; so here it is handed all positions, and the products are the same ones.
    """
    (rows,) = microbatches(BATCH, 64)
    count, length = rows.tokens_NL.shape
    everywhere = rows._replace(
        row_T=torch.arange(count).repeat_interleave(length),
        position_T=torch.arange(length).repeat(count),
    )
    params = trainable_params(model)
    forward = frozen_forward(model, params)
    with torch.no_grad():
        ours_TV = forward.logits(params, forward.hidden(params, everywhere))
        theirs_NLV = reference(input_ids=rows.tokens_NL).logits
    return ours_TV.view(theirs_NLV.shape), theirs_NLV


def weighted_sum(stats: funcprobe.TokenStats) -> float:
    """sum of p l + q h with random p and q."""
    return float((P_NR * stats.logp_NR + Q_NR * stats.entropy_NR).sum())


class Routes(NamedTuple):
    """d/d eta of `weighted_sum` along a direction, and the sum of its terms without their signs."""

    forward: float
    reverse: float
    twice: float  # reverse over reverse
    size: float

    def require_equal(self, tolerance: float) -> None:
        """Terms of both signs cancel: rounding is relative to their size, not to what is left."""
        assert abs(self.forward) > 1e-4 * self.size
        assert self.reverse == pytest.approx(self.forward, abs=tolerance * self.size)
        assert self.twice == pytest.approx(self.forward, abs=tolerance * self.size)


def three_routes(probe: funcprobe.Probe, direction: funcprobe.Params) -> Routes:
    """The same derivative by three ways; every tensor of the registry has a part in it."""
    grads = probe.weighted_grad(probe.params, BATCH, P_NR, Q_NR)
    assert all(bool(g.any()) for g in grads.values())
    _, tangent = probe.tangents(probe.params, BATCH, direction)
    s_N = probe.alpha_vjp(probe.params, BATCH, direction, p_NR=P_NR, q_NR=Q_NR)
    reverse = funcprobe.tree.dot(grads, direction)
    size = float((P_NR * tangent.logp_NR).abs().sum() + (Q_NR * tangent.entropy_NR).abs().sum())
    return Routes(weighted_sum(tangent), reverse, float(s_N.sum()), size)


def central_difference(probe: funcprobe.Probe, direction: funcprobe.Params, eta: float) -> float:
    """(f(theta + eta v) - f(theta - eta v)) / (2 eta)."""
    ends = [
        weighted_sum(probe.token_stats(funcprobe.tree.axpy(s * eta, direction, probe.params), BATCH))
        for s in (1.0, -1.0)
    ]
    return (ends[0] - ends[1]) / (2 * eta)


def make_policy(
    architecture: str = "qwen2",
    adapter: str = "all-linear",
    dtype: torch.dtype = torch.float64,
    *,
    tied: bool = False,
    base: Any = None,
) -> PeftModel:
    """Biases and every trained tensor moved away from what initialisation gives them."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = ARCHITECTURES[architecture](tie_word_embeddings=tied) if base is None else base
        for name, p in base.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.2)
        model = get_peft_model(base, lora_config(architecture, adapter))
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # rejected where the table is trained
    return model.to(dtype).eval()
