"""Decoders with one kind of softmax attention, or sliding and full attention in turns, and a dense MLP."""

from __future__ import annotations

from .base import GRANITE, SLIDING, WINDOW, Settings, of

FULL: dict[str, Settings] = {
    **of("apertus", "arcee", "bitnet", "diffllama", "ernie4_5", "gemma", "glm", "glm4", "helium"),
    **of("hunyuan_v1_dense", "hyperclovax", "jais2", "llama", "nemotron", "olmo", "olmo2", "persimmon", "phi"),
    **of("seed_oss", "stablelm"),
    **of("biogpt", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "openai-gpt"),
    **of("codegen", "gptj", rotary_dim=8),
    **of("opt", "xglm", ffn_dim=96),
    "cohere": {"logit_scale": 0.5},
    "ctrl": {"dff": 96},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "granite": GRANITE,
    "qwen3": {"head_dim": 24},
    "nanochat": {"final_logit_softcapping": 3.0},
}

CAPPED: Settings = {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}

WINDOWED: dict[str, Settings] = {
    **of("ministral3", "mistral", "phi3", "starcoder2", sliding_window=WINDOW),  # in every layer
    **of("cwm", "exaone4", "ministral", "olmo3", **SLIDING),
    **of("qwen2", "smollm3", use_sliding_window=True, **SLIDING),
    "gemma2": {**SLIDING, **CAPPED},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 20},
    "vaultgemma": {**SLIDING, **CAPPED},
    "cohere2": {**SLIDING, "logit_scale": 0.5},
    "cohere_compass_text": {
        **SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
            "full_attention": None,
        },
    },
    "gpt_neo": {"num_hidden_layers": 4, "attention_types": [[["local", "global"], 2]], "window_size": WINDOW},
    "granite_swa": {**SLIDING, **GRANITE},
    "modernbert-decoder": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "local_attention": WINDOW,
    },
}

CONFIGS: dict[str, Settings] = {**FULL, **WINDOWED}
