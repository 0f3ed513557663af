"""The rounds of a generation: what a policy sees, what is evicted, and the pages of the steps until the next one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lethe_compile.cache import KVCache, Rows
from lethe_compile.compiled import CompiledGraph, padded
from lethe_compile.errors import OutOfPagesError
from lethe_compile.ledger import Counts, Ledger
from lethe_compile.listeners import Listeners
from lethe_compile.policies.base import Policy, RoundState
from lethe_compile.recorder import Sample

_ATTEMPTS = 4  # to reserve pages; each but the first after a round that prunes harder


def round_state(
    compiled: CompiledGraph,
    policy: Policy,
    cache: KVCache,
    prompt_length: Tensor,
    next_position: Tensor,
    active: Tensor,
    rows: Rows | None = None,
) -> RoundState:
    """The cache as `policy` sees it at a round, of all rows or of `rows`; the others are ``[sequences]`` of those.

    Scores and keys are of all ranks' heads. What the cache holds stays this rank's own part: both rules by which it
    goes on, sum and peak, commute with the reduction. Rows that are KV heads are one rank's alone. The device is not
    waited for.
    """
    sets, ranks = compiled.keep_sets, compiled.ranks

    def keys(layer: int) -> Tensor:
        own = cache.keys(layer, rows)
        if ranks is None or policy.per_head:
            return own
        return ranks.all_heads(own, compiled.caches[layer].kv_parts)

    mass, position, length = cache.scores(rows)
    if ranks is not None and policy.decay is not None and not policy.per_head:
        mass = ranks.reduced(mass, peak=policy.peak)
    prompts, following, on = map(sets.spread, (prompt_length, next_position, active))
    windows = compiled.windows
    return RoundState(mass, position, length, windows, prompts, following, on, key_source=keys, heads=sets.heads)


class Rounds:
    """Those of one generation, all rows in step: after the prefill, and then one every `interval` steps.

    Args:
        ledger: hears what the device says at each round, and what was evicted.
        prompt_lengths, next_position: ``[sequences]`` on the device; steps advance the latter.
        new_tokens: the most that each row gets, where that is known.
    """

    def __init__(
        self,
        compiled: CompiledGraph,
        cache: KVCache,
        policy: Policy,
        listeners: Listeners,
        ledger: Ledger,
        *,
        prompt_lengths: Tensor,
        next_position: Tensor,
        interval: int,
        new_tokens: int | None,
    ) -> None:
        self._compiled, self._cache, self._policy = compiled, cache, policy
        self._listeners, self._ledger = listeners, ledger
        self._prompt_lengths, self._next_position = prompt_lengths, next_position
        self._interval, self._new_tokens = interval, new_tokens
        self._live: Counts = np.zeros(cache.rows, np.int64)  # 1 for a row that may take part in the next steps
        self._until_round = 0  # steps
        self._cleared_at = -1  # steps before a round at which masses are cleared

    def begin(self, live: Counts, active: Tensor) -> None:
        """Nothing is known to evict by: reserve for the first interval, of rows that are `live` [rows]."""
        self._live = live
        self._until_round = self._interval
        self._reserve(active)
        self._observe_from()

    def before_step(self, active: Tensor) -> None:
        """The round that is due, if one is, and room for a token of each row that is `active` [up to sequences]."""
        if self._until_round == 0:
            self.run(padded(active, len(self._next_position)))
        if self._until_round == self._cleared_at:
            self._cache.clear_mass()
        self._until_round -= 1
        self._cache.assume(self._live)

    def run(self, active: Tensor) -> None:
        """Let the policy choose what stays, compact, free what finished rows held, and reserve the next interval.

        Waits for the device once, behind the compaction; more often only where pages run out.
        """
        cache, ledger = self._cache, self._ledger
        held, state = cache.pages_held(), self._state(active)
        sparsity = self._listeners.sparsity(state) if self._compiled.scored else None
        before, seen, on = self._evict(state, active)
        ledger.read(seen, before, held)
        self._record(on, before, sparsity, seen)
        self._live = on
        cache.free_rows(np.flatnonzero((on == 0) & cache.pages_held().any(0)).tolist())
        self._until_round = self._interval
        left = None if self._new_tokens is None else self._new_tokens - ledger.decoded
        if left is not None and left > 0:  # no page for tokens that nobody asked for
            self._until_round = min(self._until_round, left)
        self._reserve(active)
        self._observe_from()
        if on.any():
            counted = self._compiled.keep_sets.there(cache.rows) & (on > 0)
            ledger.timeline.append(cache.lengths.mean(1, where=counted).tolist())

    def _state(self, active: Tensor) -> RoundState:
        rows = (self._prompt_lengths, self._next_position, active)
        return round_state(self._compiled, self._policy, self._cache, *rows)

    def _record(self, on: Counts, before: Counts, sparsity: Tensor | None, seen: Counts) -> None:
        recorder = self._listeners.recorder
        if recorder is not None:
            measured = None if sparsity is None else sparsity.double().cpu().numpy()
            after, threshold = self._cache.lengths.copy(), self._policy.thresholds.cpu().numpy()
            recorder.round(Sample(self._ledger.decoded, on > 0, before, after, measured, seen, threshold))

    def _observe_from(self) -> None:
        """Set how many steps before the next round masses are cleared; never, if the policy wants every query."""
        window = self._policy.observation_window
        self._cleared_at = -1 if window is None else min(window, self._until_round)

    def _evict(self, state: RoundState, active: Tensor, limit: Tensor | None = None) -> list[Counts]:
        """Prune and compact every layer and row; the lengths before, the next positions and `active`, as read back."""
        cache, sets = self._cache, self._compiled.keep_sets
        keep = self._policy.round(state, limit)
        if keep is not None:
            self._listeners.evicted(self._ledger.decoded, state, keep)
        before, seen, on = cache.compact(keep, self._next_position, active)
        after = cache.lengths
        self._ledger.evicted(before - after, cache.pages_for(before) - cache.pages_for(after))
        return [before, sets.repeat(seen), sets.repeat(on)]

    def _reserve(self, active: Tensor) -> None:
        """Pages until the next round, pruning harder where there are too few; see `Policy.round` on limits."""
        cache, compiled, ranks = self._cache, self._compiled, self._compiled.ranks
        tokens = self._live * self._until_round
        for attempt in range(1, _ATTEMPTS + 1):
            failed: OutOfPagesError | None = None
            try:
                cache.reserve_rows(tokens)
            except OutOfPagesError as error:
                failed = error
            if ranks.everywhere(failed is None) if ranks is not None else failed is None:
                return
            if attempt == _ATTEMPTS:
                raise failed or OutOfPagesError("another rank has no room for the next steps")
            cache.trim()
            with compiled.together("find room for the next steps"):
                limit = cache.limit(tokens)
            limit = compiled.least(limit) or limit
            over = bool((cache.lengths > limit).any())
            if ranks is not None:  # rows of a rank's own heads may be shorter than another's
                over = not ranks.everywhere(not over)
            if over:
                self._ledger.pressed += 1
                limits = torch.full(cache.lengths.shape, limit, device=compiled.device)
                self._evict(self._state(active), active, limits)
