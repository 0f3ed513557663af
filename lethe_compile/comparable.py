"""Arguments of `generate` as the ranks of one model compare them, before any of them begins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lethe_compile.distributed import digest

_OWN_OPTIONS = ("streamer", "progress", "tokenizer")  # each rank may have its own


def comparable(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that must be alike, JSON-ready; of what has no value to compare, its kind."""
    shown: dict[str, Any] = {}
    for name, value in options.items():
        if value is None or name in _OWN_OPTIONS:
            continue
        if isinstance(value, Tensor):
            shown[name] = digest(value)
        elif hasattr(value, "to_dict"):
            shown[name] = value.to_dict()
        elif isinstance(value, (bool, int, float, str)):
            shown[name] = value
        elif isinstance(value, (list, tuple)):
            shown[name] = [one if isinstance(one, (bool, int, float, str)) else type(one).__name__ for one in value]
        else:
            shown[name] = type(value).__name__
    return shown
