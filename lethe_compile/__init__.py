"""Lethe Compile: rewrite a decoder's attention and KV cache so that the cache is pruned while the model generates."""

from __future__ import annotations

from importlib.metadata import entry_points

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

if "lethe" not in entry_points(group="torch_dynamo_backends").names:  # not installed: a checkout
    from torch._dynamo import register_backend

    from lethe_compile.torch_backend import lethe

    register_backend(lethe)

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
