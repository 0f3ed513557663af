"""What a generation's cache did, sequence by sequence and round by round: retained tokens, pages, and sparsity.

`OptimizedModel.recorded()` switches a recorder on; without one, a round does nothing for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.keep_sets import KeepSets
from lethe_compile.ledger import Counts

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """The cache behind one round: L layers with a cache of their own, R rows, which are `KeepSets` of sequences."""

    step: int  # decode steps before the round
    active: NDArray[np.bool_]  # [R] rows still generating
    before: Counts  # [L, R] tokens retained when the round came
    after: Counts  # [L, R] tokens it left
    sparsity: Floats | None  # [L, R] Hoyer sparsity of the scores before it; None where no scores are kept
    seen: Counts | None = None  # [R] tokens fed so far, evicted ones too
    threshold: Counts | None = None  # [L, R] tokens from which on the policy prunes next; as `Policy.thresholds`


@dataclass(frozen=True)
class Eviction:
    """The E tokens that one round dropped: of layers `layer` [E] and rows `row` [E], at positions `position` [E]."""

    step: int  # decode steps before it
    layer: NDArray[np.int32]
    row: NDArray[np.int32]
    position: NDArray[np.int32]


@dataclass(frozen=True)
class Usage:
    """Key-value bytes of each sequence, over its own steps, the prompt's among them.

    `kv` is of retained tokens, `pool` of the pages that held them or were reserved for them.
    """

    kv_mean: Floats
    kv_peak: Counts
    pool_mean: Floats
    pool_peak: Counts


@dataclass
class Recorder:
    """Listens to one generation, the latest; `samples` has its rounds in order.

    Args:
        token_bytes: [L, 1] keys and values of one token in each layer.
        page_size: tokens a page.
        sets: rows of a sequence.
        sparsity: measure the scores at every round, which costs a kernel and a transfer.
        tokens: keep which tokens each round dropped, which costs a transfer; `evictions` has them in order.

    `refills` are the steps before which the cache was filled anew, with every token; see `OptimizedModel.restart_at`.
    """

    token_bytes: Counts
    page_size: int
    sets: KeepSets
    sparsity: bool = True
    tokens: bool = False
    samples: list[Sample] = field(default_factory=list)
    evictions: list[Eviction] = field(default_factory=list)
    refills: list[int] = field(default_factory=list)

    def begin(self, prompts: Counts, lengths: Counts, held: Counts) -> None:
        """A generation starts, with `prompts` [R] tokens: tokens and pages [L, R] after the prefill."""
        self._forget(prompts)
        self._seen = self.sets.one(prompts)
        self._steps = (self._seen > 0).astype(np.int64)
        self._kv_peak, self._pool_peak = self._kv(lengths), self._pool(held)
        self._kv_sum, self._pool_sum = self._kv_peak.astype(np.float64), self._pool_peak.astype(np.float64)

    def read(self, seen: Counts, lengths: Counts, held: Counts) -> None:
        """The host has read back next positions [R], tokens and pages [L, R], before anything is evicted.

        A row took part in its first steps since the last reading, one token each; pages did not change meanwhile.
        """
        now = self.sets.one(seen)
        fed = now - self._seen  # [sequences]
        each = self.sets.repeat(fed)  # [R]
        retained = each * (lengths - each) + each * (each + 1) // 2  # [L, R] tokens after each of those steps, added up
        kv, pool = self._kv(lengths), self._pool(held)
        self._kv_sum += self._kv(retained)
        self._pool_sum += fed * pool
        self._kv_peak = np.where(fed > 0, np.maximum(self._kv_peak, kv), self._kv_peak)
        self._pool_peak = np.where(fed > 0, np.maximum(self._pool_peak, pool), self._pool_peak)
        self._seen, self._steps = now, self._steps + fed

    def _kv(self, tokens: Counts) -> Counts:
        """[sequences] of tokens [L, R]: all layers, and all rows of a sequence."""
        tokens = tokens * self.sets.there(tokens.shape[1])
        total: Counts = (tokens * self.token_bytes).sum(0).reshape(-1, self.sets.heads).sum(1)
        return total

    def _pool(self, pages: Counts) -> Counts:
        return self._kv(pages * self.page_size)

    def _forget(self, prompts: Counts) -> None:
        """Of the rounds before."""
        self.samples, self.evictions, self.refills = [], [], []

    def round(self, sample: Sample) -> None:
        """A round has ended."""
        self.samples.append(sample)

    def evicted(self, step: int, position: Tensor, keep: Tensor) -> None:
        """A round leaves `keep` [L, R, N] bool of the tokens at `position` [L, R, N], -1 where there is none."""
        gone = (position >= 0) & ~keep
        layer, row, slot = gone.nonzero(as_tuple=True)
        found = torch.stack([layer, row, position[layer, row, slot].long()]).int().cpu().numpy()
        if found.shape[1]:
            self.dropped(Eviction(step, *found))

    def dropped(self, eviction: Eviction) -> None:
        """A round has dropped some tokens."""
        self.evictions.append(eviction)

    def refilled(self, step: int) -> None:
        """The cache was filled anew after `step` decode steps, with all that was evicted."""
        self.refills.append(step)

    def usage(self) -> Usage:
        """Bytes so far; of sequences without a prompt, zeros."""
        steps = np.maximum(self._steps, 1)
        return Usage(self._kv_sum / steps, self._kv_peak, self._pool_sum / steps, self._pool_peak)

    def by_layer(self) -> tuple[list[int], Floats, Floats]:
        """Steps [S], retained tokens [S, L] after each round, and sparsity [S, L], means over active rows.

        Sparsity is NaN where it was not measured, as at a first round that has nothing to measure.
        """
        kept = [sample for sample in self.samples if sample.active.any()]
        if not kept:
            return [], np.zeros((0, 0)), np.zeros((0, 0))
        there = self.sets.there(len(kept[0].active))  # [L, R]
        retained = np.stack([sample.after.mean(1, where=there & sample.active) for sample in kept])
        nothing = np.full(len(retained[0]), np.nan)
        sparsity = [nothing if s.sparsity is None else s.sparsity.mean(1, where=there & s.active) for s in kept]
        return [sample.step for sample in kept], retained, np.stack(sparsity)
