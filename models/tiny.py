"""The tiny decoders that most tests use: six of `lethe_compile.models.architectures`, and their factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import architectures
from .architectures import build as tiny

__all__ = ["CONFIGS", "factory", "gemma2", "gpt2", "llama", "mistral", "qwen2", "qwen3", "tiny"]

NAMES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2")
CONFIGS = {name: architectures.CONFIGS[name] for name in NAMES}


def factory(name: str) -> Callable[[], Any]:
    """`package.module:factory` for command lines, such as ``lethe_compile.models.tiny:llama``."""
    return lambda: tiny(name)


llama, qwen2, qwen3 = factory("llama"), factory("qwen2"), factory("qwen3")
mistral, gemma2, gpt2 = factory("mistral"), factory("gemma2"), factory("gpt2")
