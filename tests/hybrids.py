"""Tiny random decoders that carry state of another kind beside keys and values, each feature small enough to bite."""

from __future__ import annotations

from typing import Any

import torch

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # else a token tends to follow itself
}
_ALTERNATING = {"layer_types": ["linear_attention", "full_attention"] * 2}
_DELTA = {
    **_ALTERNATING,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 3}
_MAMBA2 = {**_MAMBA, "mamba_n_heads": 8, "mamba_chunk_size": 8}
_SHARED = {"layers_block_type": ["linear_attention", "hybrid"] * 2, **_MAMBA, "use_mamba_kernels": False}

CONFIGS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "num_hidden_layers": 3},
    "granitemoehybrid": {
        **_ALTERNATING,
        **_MAMBA2,
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "attention_multiplier": 0.25,
        "position_embedding_type": "rope",
    },
    "jamba": {
        **_MAMBA,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **_ALTERNATING,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse", "dense", "dense"],
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "linear_conv_kernel_dim": 3,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 3, **_EXPERTS},
    "minimax": {**_ALTERNATING, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "block_size": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention", "full_attention", "mlp"],
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "conv_kernel": 3,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "olmo_hybrid": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**_DELTA, "head_dim": 16},
    "qwen3_next": {
        **_DELTA,
        **_EXPERTS,
        "head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [0, 1, 2],
    },
    "recurrent_gemma": {"num_hidden_layers": 6, "attention_window_size": 48, "lru_width": 64},
    "zamba": {**_SHARED, "attention_head_dim": 32},
    "zamba2": {**_SHARED, "chunk_size": 8, "use_mem_rope": True, "num_mem_blocks": 2, "adapter_rank": 8},
    "zaya": {
        **_EXPERTS,
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "sliding_window": 24,
        "head_dim": 16,
        "router_hidden_size": 16,
    },
}

QUICK = ("granitemoehybrid", "jamba", "lfm2", "qwen3_next", "recurrent_gemma", "zamba2")
"""One of each idiom: state in the cache or on the module, in one layer with attention or apart, experts or none."""

PADDING_SHOWS = ("minimax", "recurrent_gemma")
"""Where transformers' own `generate` computes something else for a row that is padded on the left."""


def hybrid(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A random causal LM of the architecture `name`, its matrices wide enough that a lost state shows."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    known = {**_COMMON, **CONFIGS.get(name, {}), **overrides}
    known = {key: value for key, value in known.items() if hasattr(CONFIG_MAPPING[name], key)}  # not all have all
    config = AutoConfig.for_model(name, **known)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            elif path.endswith("qk_norm.temp"):  # of zaya: 0 at first, and then attention sees no differences
                parameter.fill_(1.0)
            elif not parameter.any():
                parameter.normal_(std=0.1)  # so that a bias left out shows
    return model.eval()
