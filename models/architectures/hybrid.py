"""Decoders that mix softmax attention with state-space, recurrent, convolutional or linear attention layers."""

from __future__ import annotations

from .base import CHUNK, DENSE_AND_SPARSE, GRANITE, LATENT, WINDOW, Settings, of

LINEAR_AND_FULL: Settings = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"]}

CONFIGS: dict[str, Settings] = {
    **of("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", **LINEAR_AND_FULL),
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "granitemoehybrid": {**LINEAR_AND_FULL, **GRANITE, "position_embedding_type": "rope"},
    "inkling_text": {
        **DENSE_AND_SPARSE,
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "sliding_window": WINDOW,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 8,
        "conv_kernel_size": 3,
        "d_rel": 8,
        "rel_extent": 12,
        "log_scaling_n_floor": 4,
        "logits_mup_width_multiplier": 2.0,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**LINEAR_AND_FULL, **LATENT, **DENSE_AND_SPARSE, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "minimax": {**LINEAR_AND_FULL, "block_size": CHUNK},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention", "full_attention", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "conv_kernel": 3,
        "moe_shared_expert_intermediate_size": 32,
        "use_mamba_kernels": False,
    },
    "recurrent_gemma": {
        "logits_soft_cap": 3.0,
        "num_hidden_layers": 6,
        "attention_window_size": WINDOW,
        "lru_width": 64,
        "conv1d_width": 3,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_head_dim": 32,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"],
        "use_mamba_kernels": False,
        "use_mem_rope": True,
        "num_mem_blocks": 2,
        "adapter_rank": 8,
    },
    "zaya": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "sliding_window": WINDOW,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
}
