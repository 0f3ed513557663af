"""Where the slots of each layer and row lie, as a tensor for the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_

import torch
from torch import Tensor

from lethe_compile.allocator import Layout, Pages
from lethe_compile.pools import Pools


class PageTable:
    """Page ids of all layers and rows on the device, sent there by `upload`.

    Attributes:
        tensor: [layers, rows, width] int32; 0, a valid page, where there is none.
        replaced: how often that was made anew.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.tensor = torch.zeros(layers, 0, 0, dtype=torch.int32, device=device)
        self.replaced = 0
        self._device, self._layers = device, layers
        self._staging = _Staging(device)
        self._shown: list[Layout] = []  # what `tensor` says; a layout is never changed, but another takes its place

    def upload(self, pools: Pools, rows: int, width: int = 0) -> None:
        """Say where pages lie now, if that has changed. It widens by more than asked, so that it seldom does."""
        layouts = [pool.layout for pool in pools]
        same = bool(self._shown) and all(map(is_, layouts, self._shown))
        if same and width <= self.tensor.shape[2]:
            return
        self._shown = []  # until all of it is said
        width = max(1, width, *(layout.table.shape[1] for layout in layouts))
        shape = (self._layers, rows)
        if self.tensor.shape[:2] != shape or self.tensor.shape[2] < width:
            width = -(-width * 5 // 32) * 8  # a quarter more, in eights
            self.tensor = torch.empty(*shape, width, dtype=torch.int32, device=self._device)
            self.replaced += 1
        with self._staging.fill(self.tensor) as table:
            for pool in pools:
                ids = pool.layout.table * pool.layout.held()
                table[pool.layers, :, : ids.shape[1]] = ids.reshape(len(pool.layers), rows, ids.shape[1])
        self._shown = layouts


class _Staging:
    """A host buffer through which a tensor is sent to the device without waiting for it; pinned for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=torch.int32)
        self._sent: torch.cuda.Event | None = None

    @contextmanager
    def fill(self, target: Tensor) -> Iterator[Pages]:
        """A zeroed array of the shape of `target`, int32, to be filled; it is sent when the context ends."""
        if self._sent is not None:
            self._sent.synchronize()  # the buffer is read until then; it seldom still is
        if self._buffer.shape != target.shape:
            self._buffer = torch.empty(target.shape, dtype=torch.int32, pin_memory=self._pinned)
        array = self._buffer.zero_().numpy()
        yield array
        target.copy_(self._buffer, non_blocking=True)
        if self._pinned:
            self._sent = torch.cuda.Event()
            self._sent.record(torch.cuda.current_stream(target.device))
