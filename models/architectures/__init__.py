"""Tiny random decoders of every causal language model of transformers, each feature small enough to bite.

`ARCHITECTURES` are the keys of transformers' causal mapping with softmax attention, `OTHERS` the remaining ones with
the reason. `build` makes a model; `KNOWN` says where transformers itself departs from a causal model with a cache.
"""

from __future__ import annotations

from .building import ARCHITECTURES, CONFIGS, build
from .known import KNOWN, NO_CACHE, NOT_CAUSAL, OTHERS, TIES

__all__ = ["ARCHITECTURES", "CONFIGS", "KNOWN", "NOT_CAUSAL", "NO_CACHE", "OTHERS", "TIES", "build"]
