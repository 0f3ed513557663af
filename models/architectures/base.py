"""What tiny configurations share: small sizes of every feature, and the patterns in which kinds of layers alternate."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

WINDOW = 7  # tokens: a sliding window that hides something within a prompt of ten
CHUNK = 8

# One size for every field that configurations share. A configuration takes those that it declares, by any of its
# names (`attribute_map`); what an architecture gives itself comes after and wins.
BASE: Settings = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,  # else generate ends every text with it
    # the decoders of encoder-decoder families; their caches are sized by the encoder's counts
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 1,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    # latent attention: keys of 16 + 8, values of 12
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    # sparse attention's indexer
    "index_topk": 6,
    "index_head_dim": 16,
    "index_n_heads": 16,  # scores sum ReLUs over the heads: with few, many keys tie at zero
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    # state-space layers
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_chunk_size": CHUNK,
    "chunk_size": CHUNK,
}

# Lists with one entry a layer: written once for the pattern, repeated or cut to the number of layers.
PER_LAYER = {
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "indexer_types",
    "activation_sparsity_pattern",
    "num_attention_heads_per_layer",
}

UNDECLARED = {"global_head_dim"}  # configurations take these among their keyword arguments

SLIDING: Settings = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
}
DENSE_AND_SPARSE: Settings = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
LATENT: Settings = {"num_key_value_heads": 4}  # the latent expands to keys and values of every head
# Multipliers that default to 1 and would not show if they were dropped.
GRANITE: Settings = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}


def of(*names: str, **settings: Any) -> dict[str, Settings]:
    """The same settings for each of `names`."""
    return {name: dict(settings) for name in names}
