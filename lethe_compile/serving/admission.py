"""Who fits: the arithmetic of pages, before anything is reserved."""

from __future__ import annotations

import numpy as np

from lethe_compile.errors import InputError
from lethe_compile.ledger import Counts
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.batch import Batch
from lethe_compile.serving.job import Job

_WITHOUT_END = 1 << 40  # new tokens


class Admission:
    """What a request needs of the pool, by the policy's bound and not by its greatest length.

    A policy with caps says how much a row may ever hold: that much is kept for it. Without caps a row is admitted for
    its prompt and one interval of new tokens; if all rows together come to need more than there is, that is pressure.

    Attributes:
        floor: tokens of a layer below which pressure prunes no row while another could be preempted instead: the
            configured `prune_threshold`, or what the policy can do if that is more.
        hard_floor: below which it cannot go, by what the policy states.
    """

    def __init__(self, fast: OptimizedModel, batch: Batch) -> None:
        self._fast, self._batch = fast, batch
        self._policy, self._heads = batch.policy.policy, fast.keep_sets.heads
        nothing: Counts = np.zeros(self._heads, np.int64)
        open_end = self._policy.least_tokens(nothing, _WITHOUT_END, [None] * len(fast.caches))
        self.hard_floor = max(1, int(open_end.max()) - batch.interval)
        self.floor = max(self.hard_floor, fast.config.prune_threshold)

    def check(self, prompt: int, new_tokens: int) -> None:
        """Raises `InputError` for a request that cannot be served even alone, however hard it is pruned."""
        allowed = self._batch.cache.max_bytes
        if allowed is None:
            return
        prompts = np.full(self._heads, prompt, np.int64)
        need = self._batch.cache.bytes_for(self._policy.least_tokens(prompts, new_tokens, self._fast.windows))
        if need > allowed:
            raise InputError(
                f"{prompt} prompt and {new_tokens} new tokens need {need} bytes of KV cache under policy"
                f" {self._policy.name!r}, and the engine has {allowed} in all: shorten the prompt, lower"
                " max_new_tokens, raise kv_memory, or prune with a policy that needs less"
            )

    def claim(self, prompt: int, new_tokens: int) -> Counts | None:
        """[layers, heads] tokens that a row may come to hold after its prefill; None where no cap says so."""
        prompts = np.full(self._heads, prompt, np.int64)
        return self._policy.most_tokens(prompts, new_tokens, self._fast.windows)

    def holds(self, tokens: int) -> bool:
        """Whether the pool could hold so many tokens in every layer of one sequence."""
        allowed, each = self._batch.cache.max_bytes, np.full((len(self._fast.caches), self._heads), tokens, np.int64)
        return allowed is None or self._batch.cache.bytes_for(each) <= allowed

    def fits(self, job: Job, rows: list[Job], needs: Counts) -> bool:
        """Whether `job` finds room beside `rows`, whose tokens to come are `needs` [cache's rows]."""
        batch = self._batch
        allowed = batch.cache.max_bytes
        if allowed is None or not rows:
            return True
        tokens = batch.cache.lengths + needs  # [layers, cache's rows]
        for row, other in enumerate(rows):
            if other.claim is not None:
                at = batch.rows_of(row)
                tokens[:, at] = np.maximum(tokens[:, at], other.claim)
        soon = len(job.source) + min(batch.interval, job.prompt + job.terms.new_tokens - len(job.source))
        own = np.full((len(tokens), self._heads), soon, np.int64)
        if job.claim is not None:
            own = np.maximum(len(job.source), job.claim)
        if job.wants is not None:
            own = np.maximum(own, job.wants)
        tokens[:, batch.rows_of(len(rows))] = own
        return batch.cache.bytes_for(tokens) <= allowed
