"""Decoders that stand alone: shared keys, bytes in patches, learned prompts, relative terms, stacks run in cycles."""

from __future__ import annotations

from .base import SLIDING, Settings

BLT_STACK: Settings = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SHARED_KEYS: Settings = {
    **SLIDING,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 16,
}

CONFIGS: dict[str, Settings] = {
    "blt": {
        "patcher_config": {**BLT_STACK, "vocab_size": 97},
        "encoder_config": {**BLT_STACK, "vocab_size": 97, "hidden_size_global": 128},
        "decoder_config": {**BLT_STACK, "vocab_size": 97, "hidden_size_global": 128},
        "global_config": {**BLT_STACK, "hidden_size": 128},
        "encoder_hash_byte_group_vocab": 101,
        "use_cache": False,
    },
    "cpmant": {
        "init_std": 0.02,
        "dim_head": 16,
        "dim_ff": 96,
        "prompt_types": 4,
        "prompt_length": 4,
        "segment_types": 4,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 64,
    },
    "gemma3n_text": {
        **SHARED_KEYS,
        "final_logit_softcapping": 0.5,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": {
        **SHARED_KEYS,
        "global_head_dim": 32,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "use_double_wide_mlp": True,
    },
    "gemma4_unified_text": {
        **SLIDING,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "use_bidirectional_attention": None,
        "global_head_dim": 32,
    },
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 2, "prefix_lm": False},
    "xlm": {"causal": True, "mask_token_id": 5},
    "xlnet": {"d_inner": 96},
}
