"""Lethe Compile: rewrite a decoder's attention and KV cache so that the cache is pruned while the model generates.

Torch is imported with the first thing that needs it: what runs an exported artifact does not.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lethe_compile.config import LetheConfig
from lethe_compile.errors import (
    ArtifactError,
    ConfigError,
    EngineBusyError,
    EngineClosedError,
    InputError,
    LetheError,
    MissingPackageError,
    OutOfPagesError,
    UnsupportedGraphError,
    VerificationError,
)

if TYPE_CHECKING:
    from lethe_compile.api import optimize
    from lethe_compile.comparison import Comparison, Thresholds, compare
    from lethe_compile.exporters import export
    from lethe_compile.runtime import OptimizedModel
    from lethe_compile.serving import Engine, Request, SamplingParams

if "lethe" not in entry_points(group="torch_dynamo_backends").names and find_spec("torch"):  # a checkout
    from torch._dynamo import register_backend

    from lethe_compile.torch_backend import lethe

    register_backend(lethe)

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Comparison",
    "ConfigError",
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "InputError",
    "LetheConfig",
    "LetheError",
    "MissingPackageError",
    "OptimizedModel",
    "OutOfPagesError",
    "Request",
    "SamplingParams",
    "Thresholds",
    "UnsupportedGraphError",
    "VerificationError",
    "compare",
    "export",
    "optimize",
]

_LATE = {
    "Comparison": "lethe_compile.comparison",
    "Engine": "lethe_compile.serving",
    "OptimizedModel": "lethe_compile.runtime",
    "Request": "lethe_compile.serving",
    "SamplingParams": "lethe_compile.serving",
    "Thresholds": "lethe_compile.comparison",
    "compare": "lethe_compile.comparison",
    "export": "lethe_compile.exporters",
    "optimize": "lethe_compile.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATE[name]), name)
    return value
