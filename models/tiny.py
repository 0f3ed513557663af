"""Tiny random decoders of real architectures: every feature small enough to bite within a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = 7

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "num_hidden_layers": 3},
    "qwen2": {**_COMMON, "num_hidden_layers": 3},
    "qwen3": {**_COMMON, "num_hidden_layers": 3, "head_dim": 24},
    "mistral": {**_COMMON, "num_hidden_layers": 3, "sliding_window": _WINDOW},
    "gemma2": {
        **_COMMON,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window": _WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A randomly initialised Hugging Face causal LM of the architecture `name`, in evaluation mode.

    Weights are drawn wider than transformers does, so that attention is far from uniform and a wrong mask shows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in CONFIGS:
        raise KeyError(f"no tiny configuration of {name!r}; there are {', '.join(CONFIGS)}")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**CONFIGS[name], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # sdpa would drop gemma2's softcap
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def factory(name: str) -> Callable[[], Any]:
    """`package.module:factory` for command lines, such as ``lethe_compile.models.tiny:llama``."""
    return lambda: tiny(name)


llama, qwen2, qwen3 = factory("llama"), factory("qwen2"), factory("qwen3")
mistral, gemma2, gpt2 = factory("mistral"), factory("gemma2"), factory("gpt2")
