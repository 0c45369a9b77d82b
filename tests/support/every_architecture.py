"""A small policy of every causal class that transformers has, with LoRA on all linear layers."""

import dataclasses
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from funcprobe.policy.trials import attempt

VOCABULARY = 24
LARGEST = 4_000_000  # parameters
# Fields of configurations by name, whichever a class has; a window shorter than the sequences.
SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    32: """hidden_size n_embd d_model dim embedding_size word_embed_proj_dim emb_dim decoder_hidden_size
        mamba_d_ssm attention_hidden_size lru_width linear_attn_hidden_size""",
    48: """intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim d_inner
        shared_intermediate_size intermediate_size_mlp ffn_hidden_size""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_blocks num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads num_key_value_heads attention_heads linear_num_key_heads
        linear_num_value_heads num_encoder_attention_heads num_decoder_attention_heads
        swa_num_attention_heads swa_num_key_value_heads num_experts_per_tok moe_k moe_topk top_k_experts
        mamba_d_conv conv_kernel linear_conv_kernel_dim mamba_expand expand index_n_heads""",
    16: """head_dim global_head_dim d_kv swa_head_dim moe_intermediate_size
        shared_expert_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size""",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
    4: """sliding_window attention_chunk_size local_attention window_size num_experts num_local_experts
        n_routed_experts moe_num_experts num_moe_experts""",
    1: "n_shared_experts num_shared_experts first_k_dense_replace n_group topk_group",
    8: """q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim
        linear_value_head_dim ssm_state_size state_size mamba_d_state mamba_d_head mamba_head_dim
        time_step_rank mamba_dt_rank index_head_dim chunk_size mamba_chunk_size
        hidden_size_per_layer_input""",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()} | {
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.15,
    "is_decoder": True,
}
# What some classes need beside it, by model_type; a nested configuration as a dict of its own fields.
JAMBA = {"offset": 1, "period": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
MORE: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "xlm": {"causal": True},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
}
# Linear layers that peft cannot adapt: mixers of Mamba, routers whose forward is not a linear layer's.
NO_MIXER, NO_ROUTER = ["out_proj"], ["router"]
WITHOUT = {
    "falcon_h1": NO_MIXER,
    "falcon_mamba": NO_MIXER,
    "llama4_text": NO_ROUTER,
    "mamba": NO_MIXER,
    "mamba2": NO_MIXER,
    "nemotron_h": NO_MIXER,
    "phimoe": NO_ROUTER,
}


def model_types() -> list[str]:
    """One model_type for each class, the text model's where several share it."""
    types: dict[Any, str] = {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
        if kind not in types or name.endswith("_text"):
            types[kind] = name
    return sorted(types.values())


def small_config(model_type: str) -> Any:
    """The class's configuration with every size small, and one layer of each kind that it has."""
    kind = CONFIG_MAPPING[model_type]
    names = {f.name for f in dataclasses.fields(kind)}
    nested = getattr(kind, "sub_configs", {})
    given = {n: v for n, v in SMALL.items() if n in names} | MORE.get(model_type, {})
    if "text_config" in nested:
        inner = small_config(kind().text_config.model_type)
        return kind(**given | {"text_config": inner.to_dict()})
    kinds = list(dict.fromkeys(getattr(kind(), "layer_types", None) or ()))
    if "layer_types" in names and kinds and "layer_types" not in given:
        kinds = kinds if len(kinds) > 1 else kinds * 2
        given |= {"layer_types": kinds} | {
            n: len(kinds) for n in ("num_hidden_layers", "n_layer") if n in given
        }
    return kind(**given)


UNTRIED = {
    "ctrl": "its positions stay in float32, so that differences in float64 cannot confirm its tangents",
    "kimi_linear": "its recurrence takes minutes at any size",
}


def untried(model_type: str) -> str:
    """Why there is no small policy of a class here; empty where there is one."""
    if model_type in UNTRIED:
        return UNTRIED[model_type]

    def size() -> int:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(small_config(model_type))
        return sum(p.numel() for p in base.parameters())

    found = attempt(size)
    if isinstance(found, str):
        return f"no small configuration: {found}"
    return "" if found <= LARGEST else f"no small configuration: {found:,} parameters are left"


def small_policy(model_type: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Random weights, none of them as initialisation leaves them, LoRA's factors among them."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        base = AutoModelForCausalLM.from_config(small_config(model_type))
        for module in base.modules():
            for p in module.parameters(recurse=False):
                if isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Embedding) or p.dim() == 3:
                    torch.nn.init.normal_(p, std=0.15)
                else:
                    p.data += 0.1 * torch.randn_like(p)
        transposed = any(isinstance(m, Conv1D) for m in base.modules())
        lora = LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules="all-linear",
            exclude_modules=WITHOUT.get(model_type),
            task_type="CAUSAL_LM",
            fan_in_fan_out=transposed,
        )
        model = get_peft_model(base, lora)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
    return model.to(dtype).eval()


def one_by_one(model_type: str) -> PeftModel:
    """The same policy in float64, with experts one after another, which have float64."""
    model = small_policy(model_type, torch.float64)
    model.get_base_model().set_experts_implementation("eager")
    return model
