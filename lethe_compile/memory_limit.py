"""What a generation's cache may take, and whether a batch is sure to find room in it: before any work."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lethe_compile.cache import KVCache
from lethe_compile.compiled import CompiledGraph
from lethe_compile.errors import InputError
from lethe_compile.ledger import Counts
from lethe_compile.memory import allowance, available_bytes
from lethe_compile.policies.base import Policy


class MemoryLimit:
    """`OptimizedModel.kv_memory` as a limit on its cache, which stays from one generation to the next where it can."""

    def __init__(self, compiled: CompiledGraph) -> None:
        self._compiled = compiled
        self._allowed_by: int | float | None = None  # the `kv_memory` behind the cache's `max_bytes`

    def admit(
        self,
        cache: KVCache,
        kv_memory: int | float | None,
        policy: Policy,
        prompt_lengths: Tensor,
        new_tokens: int | None,
        cap_floor: int,
    ) -> int | Counts:
        """Set the cache's limit; tokens [layers, rows] that it should have room for at once.

        Raises:
            InputError: `new_tokens` are told, and the batch cannot be made to fit.
        """
        compiled = self._compiled
        last = cache.max_bytes if self._allowed_by == kv_memory else None
        cache.max_bytes = compiled.least(allowance(kv_memory, compiled.device, cache.pool_bytes, last))
        self._allowed_by = kv_memory
        if new_tokens is None:
            return 0
        prompts = compiled.keep_sets.fetched(prompt_lengths)
        least = policy.least_tokens(prompts, new_tokens, compiled.windows)
        allowed = cache.max_bytes
        if allowed is None and compiled.device.type == "cuda":
            allowed = compiled.least(available_bytes(compiled.device) + cache.pool_bytes)
        need = cache.bytes_for(least)
        if allowed is not None and need > allowed:
            raise InputError(
                f"{len(prompt_lengths)} sequences of up to {prompts.max(initial=0)} prompt and {new_tokens} new tokens"
                f" need {need} bytes of KV cache under policy {policy.name!r}, and {allowed} bytes are allowed"
                f" (kv_memory={kv_memory}): run fewer or shorter sequences at a time, raise kv_memory, or prune"
                " with a policy that needs less"
            )
        if cache.contiguous:
            return 0
        return least if cache.max_bytes is not None else np.minimum(least, prompts + cap_floor)
