"""The page pools of a cache, one for each geometry, and the limit that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from lethe_compile.allocator import Counts
from lethe_compile.errors import ConfigError, OutOfPagesError
from lethe_compile.pool import Geometry, Plan, Pool


class Pools:
    """The pools of all layers; those of equal geometry share one. Pages are counted as ``[layers, rows]``.

    Args:
        runs: the pages of each (layer, row) are consecutive. Pages then move as sequences grow, and a pool used to less
            than half shrinks. Otherwise pages come from anywhere and pools only grow.

    Attributes:
        of_layer: index of each layer's pool.
        max_bytes: limit of `bytes`, None for what the device has; while a pool is rebuilt, one of its tensors exists
            twice beyond that.
        bytes_peak: the most bytes since `begin`, the copies made while pools were rebuilt included.
        replaced: how often a pool got new tensors.

    Raises:
        ConfigError: no layer, or `max_bytes` is less than one page of each pool.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        *,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        runs: bool,
        max_bytes: int | None,
    ) -> None:
        if not geometries:
            raise ConfigError("a KV cache needs the geometry of at least one layer")
        self._page_size, self._runs, self.max_bytes = page_size, runs, max_bytes
        distinct = list(dict.fromkeys(geometries))
        self.of_layer = [distinct.index(geometry) for geometry in geometries]
        self._pools = [
            Pool(
                geometry,
                [layer for layer, pool in enumerate(self.of_layer) if pool == index],
                page_size=page_size,
                dtype=dtype,
                device=device,
                runs=runs,
            )
            for index, geometry in enumerate(distinct)
        ]
        least = sum(pool.page_bytes for pool in self._pools)
        if max_bytes is not None and max_bytes < least:
            raise ConfigError(f"max_bytes={max_bytes} is not allowed: one page of each pool takes {least} bytes")
        self.replaced = self.bytes_peak = self._rows = 0
        self._exhausted = False  # the device has refused to give more

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    def of(self, layer: int) -> Pool:
        """The pool of a layer."""
        return self._pools[self.of_layer[layer]]

    # ------------------------------------------------------------------------------------------------- who holds what

    def begin(self, rows: int, hint: Counts) -> None:
        """Forget every sequence, and make room for `hint` pages at once; see `PagedRows.begin`."""
        self._rows, self.bytes_peak, self._exhausted = rows, 0, False
        floors = [int(hint[pool.layers].sum()) for pool in self._pools]
        if self.max_bytes is not None and not self._runs and any(floors):
            floors = [floor * -(-self.max_bytes // self._bytes(floors)) for floor in floors]
        for pool, floor in zip(self._pools, floors, strict=True):
            pool.begin(rows, floor)
        self._adopt([pool.layout.count for pool in self._pools])

    def held(self) -> Counts:
        """[layers, rows] pages that sequences hold."""
        held = np.zeros((len(self.of_layer), self._rows), np.int64)
        for pool in self._pools:
            held[pool.layers] = pool.layout.count.reshape(len(pool.layers), self._rows)
        return held

    def hold(self, pages: Counts) -> None:
        """Every sequence gets so many pages, no fewer than it holds.

        Raises:
            OutOfPagesError: the limit forbids it, or the device has no memory left; all hold what they held.
        """
        self._adopt(self._split(pages))

    def truncate(self, pages: Counts) -> None:
        """Every sequence gives back all but its first `pages`."""
        for pool, count in zip(self._pools, self._split(pages), strict=True):
            pool.truncate(count)

    def move(self, source: slice, target: slice) -> None:
        """What rows `source` hold becomes that of rows `target`, which must hold nothing."""
        for pool in self._pools:
            pool.move(source, target, self._rows)

    # --------------------------------------------------------------------------------------------------------- figures

    @property
    def bytes(self) -> int:
        """Storage of the tensors as it is, held or free."""
        return sum(pool.bytes for pool in self._pools)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the pages that are held."""
        return sum(pool.layout.used * pool.kv_bytes for pool in self._pools)

    @property
    def beside_bytes(self) -> int:
        """Positions and masses of those."""
        return sum(pool.layout.used * (pool.page_bytes - pool.kv_bytes) for pool in self._pools)

    @property
    def pages(self) -> tuple[int, int]:
        """(held, free) pages: free ones as `max_bytes` allows, without it as the pools have them now."""
        held = sum(pool.layout.used for pool in self._pools)
        if self.max_bytes is None:
            return held, sum(pool.layout.capacity for pool in self._pools) - held
        left = self.max_bytes - self._bytes(pool.layout.used for pool in self._pools)
        return held, max(0, left) // min(pool.page_bytes for pool in self._pools)

    def kv_bytes_of(self, pages: Counts) -> int:
        """Keys and values of so many pages [layers] each."""
        return sum(int(pages[pool.layers].sum()) * pool.kv_bytes for pool in self._pools)

    def bytes_of(self, pages: Counts) -> int:
        """Of pools with so many pages and no more, positions and masses included."""
        return self._bytes(int(count.sum()) for count in self._split(pages))

    def fits(self, pages: Counts) -> bool:
        """Whether `max_bytes` allows so many pages, and the pools have them where the device can give no more."""
        return self._fits(self._split(pages))

    # ---------------------------------------------------------------------------------- counts: one [sequences] a pool

    def _split(self, pages: Counts) -> list[Counts]:
        """[layers, rows] as one flat [sequences] array per pool."""
        return [pages[pool.layers].ravel() for pool in self._pools]

    def _bytes(self, pages: Iterable[int]) -> int:
        """Of pools with so many pages each, positions and masses included."""
        return sum(n * pool.page_bytes for n, pool in zip(pages, self._pools, strict=True))

    def _fits(self, counts: Sequence[Counts]) -> bool:
        needs = [int(count.sum()) for count in counts]
        if self._exhausted and any(n > pool.layout.capacity for n, pool in zip(needs, self._pools, strict=True)):
            return False
        return self.max_bytes is None or self._bytes(needs) <= self.max_bytes

    def _adopt(self, counts: Sequence[Counts]) -> None:
        """Make every pool hold `counts` [sequences] pages, or raise and leave every sequence what it holds."""
        before = [pool.layout.count for pool in self._pools]
        for roomy in (True, False):
            plans = self._plan(counts, roomy)
            try:
                self._switch(plans)
            except torch.OutOfMemoryError:
                for pool, count in zip(self._pools, before, strict=True):
                    pool.truncate(count)
            else:
                return
        self._exhausted = True
        raise OutOfPagesError(self._refusal(counts, "the device has no memory for more than its pools have"))

    def _switch(self, plans: Sequence[Plan]) -> None:
        growth = [plan.layout.capacity - pool.layout.capacity for plan, pool in zip(plans, self._pools, strict=True)]
        for index in np.argsort(growth, kind="stable"):  # what shrinks makes room for what grows
            pool = self._pools[index]
            others = self.bytes - pool.bytes
            self.replaced += plans[index].fresh
            self.bytes_peak = max(self.bytes_peak, others + pool.adopt(plans[index]))

    def _plan(self, counts: Sequence[Counts], roomy: bool) -> list[Plan]:
        """How each pool comes to hold `counts` [sequences] pages; rebuilt ones get room to grow if `roomy`."""
        needs = [max(1, int(count.sum())) for count in counts]
        if not self._fits(counts):
            limit = f"max_bytes is {self.max_bytes}" if self.max_bytes is not None else "the device has no more"
            raise OutOfPagesError(self._refusal(counts, limit))
        layouts = [pool.extend(count) for pool, count in zip(self._pools, counts, strict=True)]
        sizes = [
            layout.capacity if layout else pool.roomy(count) if roomy else max(need, pool.layout.capacity)
            for pool, layout, count, need in zip(self._pools, layouts, counts, needs, strict=True)
        ]
        if self.max_bytes is not None and self._bytes(sizes) > self.max_bytes:
            # Every pool gets what it needs; what is left is shared in proportion to the room each asked for.
            spare, asked = self.max_bytes - self._bytes(needs), self._bytes(sizes) - self._bytes(needs)
            sizes = [need + (size - need) * spare // asked for need, size in zip(needs, sizes, strict=True)]
        return [
            Plan(layout, fresh=False) if layout and layout.capacity == size else pool.rebuild(count, size)
            for pool, layout, count, size in zip(self._pools, layouts, counts, sizes, strict=True)
        ]

    def _refusal(self, counts: Sequence[Counts], limit: str) -> str:
        needs = [max(1, int(count.sum())) for count in counts]
        return (
            f"the KV cache needs {self._bytes(needs)} bytes for {sum(needs)} pages of {self._page_size} tokens, but"
            f" {limit}. Run fewer or shorter sequences, prune harder (a smaller max_tokens, budget or sparse_ratio),"
            " or raise max_bytes"
        )
