"""Encoders run as decoders, and the decoders of encoder-decoder families on their own."""

from __future__ import annotations

from .base import Settings, of

AS_DECODER: Settings = {"is_decoder": True}

ENCODERS: dict[str, Settings] = {
    **of("bert", "bert-generation", "camembert", "data2vec-text", "ernie", "megatron-bert", **AS_DECODER),
    **of("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", **AS_DECODER),
    **of("electra", "roformer", embedding_size=32, **AS_DECODER),
    "big_bird": {**AS_DECODER, "attention_type": "original_full"},
    "xmod": {**AS_DECODER, "default_language": "en_XX"},
    "rembert": {**AS_DECODER, "input_embedding_size": 32, "output_embedding_size": 48},
    "roc_bert": {
        **AS_DECODER,
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 97,
        "shape_embed_dim": 16,
        "shape_vocab_size": 97,
    },
}

DECODERS: dict[str, Settings] = {
    **of("bart", "bigbird_pegasus", "blenderbot-small", "mbart", "mvp", "plbart", "trocr"),
    **of("marian", "pegasus", scale_embedding=True),  # else their sinusoidal positions drown the tokens
    "blenderbot": {"encoder_no_repeat_ngram_size": 0},
    "prophetnet": {
        "num_encoder_layers": 3,
        "num_decoder_layers": 3,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "is_decoder": True,
        "add_cross_attention": False,
        "num_buckets": 8,
        "relative_max_distance": 16,
    },
    "whisper": {
        "max_target_positions": 512,
        "max_source_positions": 16,
        "num_mel_bins": 8,
        "begin_suppress_tokens": None,
    },
}

CONFIGS: dict[str, Settings] = {**ENCODERS, **DECODERS}
