"""Which KV page belongs to which sequence: pure functions from one `Layout` to the next, on the host.

A *sequence* is one (layer, row) of a pool. A layout is the whole truth: free pages are those that no sequence holds, so
a free list cannot disagree with the tables, and a plan that turns out too large is simply not adopted.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Pages = NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """Page ownership in a pool of `capacity` pages.

    `count` [sequences] pages held; `table` [sequences, width >= 1] their ids in order, meaningless beyond `count`.
    """

    capacity: int
    count: Counts
    table: Pages

    @classmethod
    def empty(cls, capacity: int, sequences: int) -> Layout:
        """No sequence holds a page."""
        return cls(capacity, np.zeros(sequences, np.int64), np.zeros((sequences, 1), np.int32))

    @property
    def used(self) -> int:
        """Pages held by all sequences together."""
        return int(self.count.sum())

    def held(self, count: Counts | None = None) -> NDArray[np.bool_]:
        """[sequences, width] entries of the table that are in use, or the first `count` of each sequence."""
        columns = np.arange(self.table.shape[1])
        held: NDArray[np.bool_] = columns < (self.count if count is None else count)[:, None]
        return held

    def free(self) -> NDArray[np.intp]:
        """Ids of the pages that nobody holds, ascending."""
        taken = np.zeros(self.capacity, np.bool_)
        taken[self.table[self.held()]] = True
        return np.flatnonzero(~taken)

    def truncate(self, count: Counts) -> Layout:
        """Every sequence keeps its first `count` [sequences] pages, each at most what it holds."""
        return replace(self, count=count)


def extend_scattered(layout: Layout, count: Counts) -> Layout | None:
    """Append free pages, wherever they lie, until each sequence holds `count` (>= now); None if there are too few."""
    extra = count - layout.count
    free = layout.free()
    if extra.sum() > free.size:
        return None
    table = np.zeros((count.size, _width(count)), np.int32)
    table[:, : layout.table.shape[1]] = layout.table[:, : table.shape[1]]
    sequence = np.repeat(np.arange(count.size), extra)
    before = np.cumsum(extra) - extra  # new pages of the sequences ahead
    table[sequence, np.arange(sequence.size) + np.repeat(layout.count - before, extra)] = free[: sequence.size]
    return Layout(layout.capacity, count, table)


def extend_runs(layout: Layout, count: Counts) -> Layout | None:
    """Grow each sequence to `count` (>= now) pages, all of them one run of consecutive ids.

    A sequence grows in place if the pages behind it are free, else it moves to a free extent that was free before this
    call, so that moves can be copied in any order. None if some sequence finds no place.
    """
    start = layout.table[:, 0].astype(np.int64)
    order, _, size = _extents(start, layout.count, layout.capacity)
    behind = np.zeros_like(count)
    behind[order] = size[1:]
    moving = (count > layout.count) & ((layout.count == 0) | (count - layout.count > behind))

    # A sequence that moves still occupies its old pages until they have been copied.
    _, begin, size = _extents(start, np.where(moving, layout.count, count), layout.capacity)
    if count[moving].sum() > size.sum():
        return None
    largest = [(-extent, at) for extent, at in zip(size.tolist(), begin.tolist(), strict=True) if extent]
    heapq.heapify(largest)
    movers = np.flatnonzero(moving)
    for sequence in movers[np.argsort(-count[movers], kind="stable")].tolist():
        need = int(count[sequence])
        if not largest or -largest[0][0] < need:
            return None
        extent, at = largest[0]
        start[sequence] = at
        heapq.heapreplace(largest, (extent + need, at + need))
    return _runs(layout.capacity, start, count)


def pack(capacity: int, count: Counts) -> Layout:
    """Place all sequences anew in an empty pool, in order, each one run of consecutive pages.

    Free pages are spread behind the sequences in proportion to their size, so that the next growth is in place.
    """
    before = np.cumsum(count) - count
    return _runs(capacity, before * capacity // max(int(count.sum()), 1), count)


def moves(old: Layout, new: Layout) -> tuple[Pages, Pages]:
    """(source, target) ids, both [pages], where `old` keeps and `new` expects the pages that a sequence has in both."""
    width = min(old.table.shape[1], new.table.shape[1])
    kept = old.held(np.minimum(old.count, new.count))[:, :width]
    return old.table[:, :width][kept], new.table[:, :width][kept]


def _extents(start: Counts, count: Counts, capacity: int) -> tuple[NDArray[np.intp], Counts, Counts]:
    """Sequences by place [holders], then begin and size of the free extents before the first and behind each."""
    holders = np.flatnonzero(count)
    order = holders[np.argsort(start[holders])]
    begin = np.concatenate([np.zeros(1, np.int64), (start + count)[order]])
    return order, begin, np.append(start[order], capacity) - begin


def _runs(capacity: int, start: Counts, count: Counts) -> Layout:
    columns = np.arange(_width(count))
    return Layout(capacity, count, (start[:, None] + columns).astype(np.int32))


def _width(count: Counts) -> int:
    return max(1, int(count.max(initial=0)))
