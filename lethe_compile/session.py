"""One generation of an optimized model: its prefill, its steps, and what it tells of itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lethe_compile.cache import KVCache
from lethe_compile.compiled import CompiledGraph, padded
from lethe_compile.ledger import Counts, Ledger
from lethe_compile.listeners import Listeners
from lethe_compile.observation import fill_observed
from lethe_compile.past import Past
from lethe_compile.policies.base import NEVER, Policy
from lethe_compile.report import CacheStats
from lethe_compile.restart import Text, text_of
from lethe_compile.rounds import Rounds
from lethe_compile.states import States


class Session:
    """`rows` sequences on a cache and states that were begun for them, from empty to the last step.

    A cache may have room for more sequences than there are, see `CompiledGraph.bucket`: those hold nothing.

    Args:
        prompt_lengths: ``[sequences]`` tokens of each prompt, those included that hold nothing.
        interval: steps from round to round.
        new_tokens: the most that each row gets, where that is known.
        restart_at: see `OptimizedModel`.

    Attributes:
        next_position: ``[sequences]`` int64 on the device: of the next token of each.
        ledger: its figures.
    """

    def __init__(
        self,
        compiled: CompiledGraph,
        cache: KVCache,
        states: States,
        policy: Policy,
        listeners: Listeners,
        *,
        rows: int,
        prompt_lengths: Tensor,
        interval: int,
        new_tokens: int | None = None,
        restart_at: int | None = None,
    ) -> None:
        self._compiled, self._cache, self._states, self._policy = compiled, cache, states, policy
        self._listeners, self._rows, self._restart_at = listeners, rows, restart_at
        prompt_lengths = prompt_lengths.to(compiled.device)
        self._sequences = len(prompt_lengths)
        self._graph = compiled.decode_graph(self._sequences)
        if self._graph is not None:
            self.next_position = self._graph.next_position.zero_()
        else:
            self.next_position = torch.zeros_like(prompt_lengths)
        self.ledger = Ledger(len(compiled.caches), cache.rows, listeners.recorder)
        self._rounds = Rounds(
            compiled,
            cache,
            policy,
            listeners,
            self.ledger,
            prompt_lengths=prompt_lengths,
            next_position=self.next_position,
            interval=interval,
            new_tokens=new_tokens,
        )
        self._text: Text | None = None
        self._furthest = 0  # more than any position so far

    # --------------------------------------------------------------------------------------------------------- prefill

    def prefill(self, input_ids: Tensor, lengths: Tensor, whole: bool) -> Tensor:
        """See `OptimizedModel.prefill`."""
        filled = padded(lengths, self._sequences)
        prompts = self._compiled.keep_sets.fetched(filled)
        logits = self._fill(input_ids, lengths, prompts, whole)
        self.next_position.copy_(filled)
        self.ledger.prefill(prompts, self._cache.pages_held())
        self._text = text_of(input_ids, int(prompts.max(initial=0)), self._restart_at)
        self._rounds.run(filled > 0)
        return logits if whole else logits[:, 0]

    def _fill(self, ids: Tensor, lengths: Tensor, tokens: Counts, whole: bool) -> Tensor:
        """Fill an empty cache from right-padded ids ``[R, T]`` of `lengths` [R], as `tokens` [rows] has them, too.

        Returns logits ``[R, T, vocab]``, or with `whole` False those of each row's last token, ``[R, 1, vocab]``.
        """
        self._cache.reserve_rows(tokens)
        self._cache.assume(tokens)
        self._furthest = ids.shape[1]

        def run(ids: Tensor, positions: Tensor, lengths: Tensor, last: Tensor | None) -> Tensor:
            logits = self._run(ids, positions, lengths, last).float()
            self._states.has_previous_state = True
            return logits

        window = self._policy.observation_window
        if window is not None and ids.shape[1] > 1:
            return fill_observed(run, self._cache.clear_mass, ids, lengths, window, whole)
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        return run(ids, positions, lengths, None if whole else (lengths - 1).clamp(min=0))

    def _run(self, ids: Tensor, positions: Tensor, new_lengths: Tensor, last: Tensor | None = None) -> Tensor:
        return self._compiled.run(self._cache, self._states, ids, positions, new_lengths, self._furthest, last)

    def adopt(self, past: Past) -> None:
        """In place of a prefill, go on from what another cache holds; see `OptimizedModel.adopt`."""
        filled = padded(past.lengths.to(self._compiled.device), self._sequences)
        prompts = self._compiled.keep_sets.fetched(filled)
        past.fill(self._cache, prompts)
        self.next_position.copy_(filled)
        self._furthest = int(prompts.max(initial=0))
        self.ledger.prefill(prompts, self._cache.pages_held(), self._cache.lengths)
        self._rounds.begin((prompts > 0).astype(np.int64), filled > 0)

    # ----------------------------------------------------------------------------------------------------------- steps

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        """See `OptimizedModel.decode`."""
        if self._text is not None and self._text.add(tokens.masked_fill(~active, 0), self.next_position[: self._rows]):
            return self._restart(self._text.ids, active)
        self._rounds.before_step(active)
        self._furthest += 1
        if self._graph is not None:
            self._graph.tokens[: self._rows].copy_(tokens)
            self._graph.active[: self._rows].copy_(active)
            logits = self._graph.replay({**self._cache.inputs(), **self._states.inputs()})[: self._rows]
        else:
            ids = tokens.masked_fill(~active, 0)[:, None]
            logits = self._run(ids, self.next_position[:, None], active)[:, 0].float()
            self.next_position += active
        self.ledger.step()
        return logits

    def _restart(self, ids: Tensor, active: Tensor) -> Tensor:
        """Fill the cache anew from the whole text ``[rows, T]`` of rows that are `active`, as `decode` would go on."""
        self.observe()
        lengths = (self.next_position[: self._rows] + 1).masked_fill(~active, 0)
        filled = padded(lengths, self._sequences)
        tokens = self._compiled.keep_sets.fetched(filled)
        self._cache.end()
        self._states.begin(self._sequences)
        self._compiled.begin_policy(self._policy, self._cache.rows)
        logits = self._fill(ids, lengths, tokens, whole=False)
        self.next_position += filled > 0
        self._text = None
        self.ledger.step()
        if self._listeners.recorder is not None:
            self._listeners.recorder.refilled(self.ledger.decoded)
        self._rounds.run(filled > 0)
        return logits[:, 0]

    # --------------------------------------------------------------------------------------------------------- figures

    def observe(self) -> None:
        """Read back what the steps since the last round did."""
        held = self._cache.pages_held()
        (seen,) = self._cache.sync(self.next_position)
        self.ledger.read(self._compiled.keep_sets.repeat(seen), self._cache.lengths, held)

    def stats(self) -> CacheStats:
        """Figures as of the last `observe` or round."""
        ledger, sets, rows, cache = self.ledger, self._compiled.keep_sets, self._rows, self._cache
        thresholds, sparsity = self._policy.thresholds.cpu().numpy(), self._policy.sparsity.cpu().numpy()
        page_bytes = self._compiled.row_bytes * cache.page_size
        return CacheStats(
            seen=ledger.seen[:: sets.heads][:rows].tolist(),
            retained=sets.mean(ledger.retained, rows),
            retained_mean=sets.mean(ledger.retained_sum / max(1, ledger.steps), rows),
            rounds=sets.mean(ledger.rounds, rows),
            threshold=sets.mean(thresholds, rows, thresholds < NEVER, NEVER),
            sparsity=sets.mean(sparsity, rows, ~np.isnan(sparsity), np.nan),
            bytes_held=sets.total(ledger.held * page_bytes, rows),
            bytes_freed=sets.total(ledger.freed * page_bytes, rows),
            timeline=ledger.timeline,
            bytes_peak=cache.bytes_peak,
            bytes_mean=cache.bytes_mean,
            pressed=ledger.pressed,
            state_bytes=self._states.bytes_of(rows),
            heads=sets.each(ledger.retained, rows) if sets.heads > 1 else None,
        )
