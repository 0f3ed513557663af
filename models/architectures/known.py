"""What is not one of our architectures, and where transformers departs from a causal model with a cache (5.17)."""

from __future__ import annotations

# Keys of transformers' causal mapping without an architecture here, and why.
OTHERS: dict[str, str] = {
    **dict.fromkeys(
        ("falcon_mamba", "mamba", "mamba2"), "a state-space model: it has no attention, and its state does not grow"
    ),
    **dict.fromkeys(("rwkv", "xlstm"), "a recurrent model: it has no softmax attention, and its state does not grow"),
    "reformer": "attends within hashed buckets and local chunks, and caches hidden states rather than keys and values",
    "emu3": "a composite of text and image tokens, beside its image tokenizer",
    "fuyu": "a composite of text and vision; its text model is persimmon",
    "gemma3": "a composite of text and vision; its text model is gemma3_text",
    "gemma3n": "a composite of text, vision and audio; its text model is gemma3n_text",
    "gemma4": "a composite of text, vision and audio; its text model is gemma4_text",
    "gemma4_unified": "a composite of text, vision and audio; its text model is gemma4_unified_text",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "drafts for another model, whose hidden states, keys and values are its inputs",
    ),
    "git": "captions images: its text decoder reads an image encoder's output",
    "got_ocr2": "a composite of text and vision; its text model is qwen2",
    "gpt-sw3": "another name of gpt2, with a tokenizer of its own",
    "llama4": "a composite of text and vision; its text model is llama4_text",
    "mllama": "a composite of text and vision: its text model attends to an image encoder's output",
    "moshi": "the backbone of a speech model: a composite of text and audio codes",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "generates codes of audio, several codebooks at each step"),
    "phi4_multimodal": "a composite of text, vision and audio; its text model is like phi3",
    "qwen3_5": "a composite of text and vision; its text model is qwen3_5_text",
    "qwen3_5_moe": "a composite of text and vision; its text model is qwen3_5_moe_text",
    "qwen4_exp": "a composite of text and vision; its text model is qwen4_exp_text",
}

# A later token changes the logits of an earlier one.
NOT_CAUSAL: dict[str, str] = {
    **dict.fromkeys(
        ("big_bird", "megatron-bert", "rembert", "roformer"),
        "masks as a bidirectional encoder does, even with is_decoder=True",
    ),
    "cpmant": "reads the whole prompt in both directions, and takes the whole text at every step",
    "prophetnet": "its relative biases mix positions: a later token changes earlier logits",
    "xlnet": "attends in both directions (attn_type 'bi'); generate appends a token to predict at every step",
}

# `past_key_values` cannot carry the model from one step to the next.
NO_CACHE: dict[str, str] = {
    "blt": "creating its cache reads num_hidden_layers, which its configuration does not have",
    "openai-gpt": "has no cache: generate runs the whole text at every step",
    "recurrent_gemma": "keeps its recurrent states in the layers, and does not return its cache",
    "xlm": "has no cache; generate appends a mask token and predicts in its place",
}

# Departures that a comparison must allow for.
UNUSUAL: dict[str, str] = {
    **dict.fromkeys(
        ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        "without position_ids, forward counts from pad_token_id + 1, skipping padding; generate counts from 0",
    ),
    **dict.fromkeys(
        ("bamba", "minimax"),
        "without position_ids, forward with a cache counts from 0: it asks the first layer, which caches no keys",
    ),
}

# Which of several tokens of equal score they keep is chance.
TIES: dict[str, str] = {
    "doge": "its first layer scores tokens by content alone: which of several equal tokens it keeps is arbitrary",
}

KNOWN: dict[str, str] = {**UNUSUAL, **TIES, **NO_CACHE, **NOT_CAUSAL}
