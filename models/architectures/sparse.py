"""Decoders that choose, by their content, which earlier tokens a query attends to."""

from __future__ import annotations

from .base import DENSE_AND_SPARSE, LATENT, WINDOW, Settings, of

# A padding token embeds to zero: as a query it would score all keys alike, and which it keeps would be chance.
INDEXED: Settings = {**LATENT, **DENSE_AND_SPARSE, "pad_token_id": None}

CONFIGS: dict[str, Settings] = {
    **of("axk2", "deepseek_v32", **INDEXED),
    **of("glm_moe_dsa", "hy_v4", initializer_range=0.02, **INDEXED, indexer_types=["full", "shared"]),
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "sliding_window": WINDOW,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "index_topk": 2,
    },
    "doge": {"keep_window_size": 6},
    "minimax_m3_vl_text": {
        **DENSE_AND_SPARSE,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "dense_intermediate_size": 96,
        "rotary_dim": 8,
        "index_n_heads": 2,  # one for each KV head
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "qwen4_exp_text": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "qwen_sparse_attention"],
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "ple_conv_kernel_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 101,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 16,  # as `index_n_heads`
        "pad_token_id": None,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 6,
        "indexer_compress_ratio": 2,
    },
}
