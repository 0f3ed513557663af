"""Decoders with mixtures of experts, with latent attention, or both."""

from __future__ import annotations

from .base import CHUNK, DENSE_AND_SPARSE, GRANITE, LATENT, SLIDING, WINDOW, Settings, of

EXPERTS: dict[str, Settings] = {
    **of("flex_olmo", "glm4_moe", "jetmoe", "minimax_m2", "olmoe", "phimoe", "solar_open"),
    **of("mixtral", sliding_window=WINDOW),
    **of("qwen3_moe", use_sliding_window=True, sliding_window=WINDOW, mlp_only_layers=[1]),
    "qwen2_moe": {**SLIDING, "use_sliding_window": True, "mlp_only_layers": [1]},
    "dots1": SLIDING,
    **of("granitemoe", "granitemoeshared", **GRANITE),
    **of("hy_v3", initializer_range=0.02, **DENSE_AND_SPARSE),
    "afmoe": {**SLIDING, "num_dense_layers": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 32},
    "cohere2_moe": {**SLIDING, **DENSE_AND_SPARSE, "logit_scale": 0.5},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "ernie4_5_moe": {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone_moe": {**SLIDING, **DENSE_AND_SPARSE},
    "gpt_oss": SLIDING,
    "granitemoe_swa": {**SLIDING, **GRANITE},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "laguna": {**SLIDING, **DENSE_AND_SPARSE, "num_attention_heads_per_layer": [4, 8]},
    "llama4_text": {
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": CHUNK,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "floor_scale": 4,
    },
    "mellum": {**SLIDING, **DENSE_AND_SPARSE},
    "mimo_v2_flash": {**SLIDING, **DENSE_AND_SPARSE},
}

LATENT_EXPERTS: dict[str, Settings] = {
    **of("axk1", "deepseek_v2", "deepseek_v3", **LATENT),
    **of("glm4_moe_lite", **LATENT, **DENSE_AND_SPARSE),
    "minicpm3": {**LATENT, "dim_model_base": 32},
    "youtu": {**LATENT, "embedding_initializer_range": 0.02},
    "longcat_flash": {
        **LATENT,
        "num_layers": 3,
        "num_hidden_layers": 6,
        "head_dim": 8,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
    },
}

CONFIGS: dict[str, Settings] = {**EXPERTS, **LATENT_EXPERTS}
