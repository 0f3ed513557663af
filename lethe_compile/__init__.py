"""Lethe Compile: rewrite a decoder's attention and KV cache so that the cache is pruned while the model generates."""

from __future__ import annotations

from lethe_compile.api import optimize
from lethe_compile.config import LetheConfig
from lethe_compile.errors import (
    ConfigError,
    InputError,
    LetheError,
    OutOfPagesError,
    UnsupportedGraphError,
    VerificationError,
)
from lethe_compile.runtime import OptimizedModel

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "InputError",
    "LetheConfig",
    "LetheError",
    "OptimizedModel",
    "OutOfPagesError",
    "UnsupportedGraphError",
    "VerificationError",
    "optimize",
]
