"""The page pool of one KV geometry: its tensors, which follow the allocator's layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lethe_compile.allocator import Counts, Layout, Pages, extend_runs, extend_scattered, moves, pack
from lethe_compile.kernels.ops import compact

_GROWTH = 1.25  # capacity of a rebuilt pool over what it has to hold
_SEGMENT = 2  # capacity of a grown pool of scattered pages over what it had: CUDA graphs seldom need a new capture
_CHUNK_BYTES = 1 << 24  # of pages copied at once: bounds the scratch memory, and a host's allocator reuses the block


@dataclass(frozen=True)
class Geometry:
    """The KV of one attention layer: what a token's key and value look like.

    With `values_in_keys`, a value is the first `v_dim` numbers of its key, and is not stored again.
    """

    num_kv_heads: int
    k_dim: int
    v_dim: int
    values_in_keys: bool = False

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of the key and value of one token of one layer, without its position and mass."""
        return self.num_kv_heads * (self.k_dim + (0 if self.values_in_keys else self.v_dim)) * dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A layout to adopt; `fresh` ones need new tensors, the others only have pages moved to free places."""

    layout: Layout
    fresh: bool


class Pool:
    """Pages of all layers of one geometry.

    `tensors` are ``k_pages, v_pages [pages, kv_heads, page, dim]``, ``slot_position, slot_mass [pages, page]``; there
    are no `v_pages` where values are stored in keys. With
    `runs`, each sequence's pages are consecutive and keys and values are stored as ``[kv_heads, pages, page, dim]``, so
    that a sequence is one strided ``[kv_heads, tokens, dim]`` matrix.
    """

    def __init__(
        self,
        geometry: Geometry,
        layers: list[int],
        *,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        runs: bool,
    ) -> None:
        self.layers, self.runs = layers, runs
        self.floor = 1  # pages below which the pool does not shrink
        heads = geometry.num_kv_heads
        self._specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "k_pages": ((heads, page_size, geometry.k_dim), dtype),
            "v_pages": ((heads, page_size, geometry.v_dim), dtype),
            "slot_position": ((page_size,), torch.int32),
            "slot_mass": ((page_size,), torch.float32),
        }
        if geometry.values_in_keys:
            del self._specs["v_pages"]
        self.kv_bytes = page_size * geometry.bytes_per_token(dtype)  # of one page
        self.page_bytes = sum(math.prod(shape) * kind.itemsize for shape, kind in self._specs.values())
        self._device = device
        self.index = torch.tensor(layers, device=device)  # `layers` for the device
        self.layout = Layout.empty(0, 0)
        self.tensors = {name: self._allocate(name, 0) for name in self._specs}

    @property
    def bytes(self) -> int:
        """Bytes of the tensors' storage, used or not."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def begin(self, rows: int, floor: int) -> None:
        """Forget every sequence; the pool will not shrink below `floor` pages."""
        self.layout = Layout.empty(self.layout.capacity, len(self.layers) * rows)
        self.floor = max(1, floor)

    def extend(self, count: Counts) -> Layout | None:
        """A layout with `count` [sequences] pages in today's tensors, or None where the pool has to be rebuilt: it is
        too small or too fragmented or, where sequences are runs, used to less than half."""
        capacity, need = self.layout.capacity, int(count.sum())
        least = max(need, self.floor)
        if capacity < least or (self.runs and capacity > 2 * least):
            return None
        if not self.layout.used:
            return pack(capacity, count)
        return extend_runs(self.layout, count) if self.runs else extend_scattered(self.layout, count)

    def roomy(self, count: Counts) -> int:
        """Capacity in pages of a pool rebuilt to hold `count` pages and grow."""
        room = max(self.floor, math.ceil(_GROWTH * int(count.sum())))
        return room if self.runs else max(room, _SEGMENT * self.layout.capacity)

    def rebuild(self, count: Counts, capacity: int) -> Plan:
        """A layout with `count` pages in new tensors of `capacity` pages."""
        if not self.runs and capacity >= self.layout.capacity:
            # Ids stay, so that an allocation that fails half-way leaves every tensor usable.
            layout = extend_scattered(replace(self.layout, capacity=capacity), count)
            assert layout is not None, "capacity was chosen to hold every page"
            return Plan(layout, fresh=True)
        return Plan(pack(capacity, count), fresh=True)

    def adopt(self, plan: Plan) -> int:
        """Copy the pages whose place changes and switch to the layout; returns the most bytes held at any time.

        Tensors are replaced one by one: only one of them exists twice at a time, and none where no page is held.
        """
        peak = self.bytes
        if not self.runs and not plan.fresh:  # ids stay
            self.layout = plan.layout
            return peak
        if plan.fresh and not self.layout.used:
            self._replace(plan.layout.capacity)
            peak = max(peak, self.bytes)
        elif plan.fresh:
            source, target = moves(self.layout, plan.layout)
            for name, old in self.tensors.items():
                new = self._allocate(name, plan.layout.capacity)
                peak = max(peak, self.bytes + new.untyped_storage().nbytes())
                self._copy(old, source, new, target)
                self.tensors[name] = new
        else:
            source, target = moves(self.layout, plan.layout)
            moved = source != target
            for tensor in self.tensors.values():
                self._copy(tensor, source[moved], tensor, target[moved])
        self.layout = plan.layout
        self.floor = min(self.floor, plan.layout.capacity)  # a limit on all pools may have denied it
        return peak

    def slots(self, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Mass and position [pool's layers, rows, tokens] by a page table [layers, rows, pages] of all layers."""
        pages = table[self.index]  # [pool's layers, rows, pages]
        names = ("slot_mass", "slot_position")
        mass, position = (self.tensors[name][pages].flatten(2)[:, :, :tokens].contiguous() for name in names)
        return mass, position

    def keys(self, table: Tensor, tokens: int) -> Tensor:
        """Keys [rows, tokens, kv_heads, k_dim] by one layer's page table [rows, pages]."""
        pages = self.tensors["k_pages"][table]  # [rows, pages, kv_heads, page, k_dim]
        return pages.transpose(2, 3).flatten(1, 2)[:, :tokens]

    def clear_mass(self, pages: Tensor | None = None) -> None:
        """Set the mass of every slot to 0, or of every slot of some pages."""
        if pages is None:
            self.tensors["slot_mass"].zero_()
        else:
            self.tensors["slot_mass"].index_fill_(0, pages, 0.0)

    def pages_of(self, rows: Counts, of: int) -> Counts:
        """Ids of the pages that some rows, of so many, hold in all layers of the pool."""
        table = self.layout.table.reshape(len(self.layers), of, -1)[:, rows]
        held = self.layout.held().reshape(len(self.layers), of, -1)[:, rows]
        return table[held].astype(np.int64)

    def move(self, source: slice, target: slice, rows: int) -> None:
        """Rows `target`, of so many, take over the pages of rows `source`."""
        count, table = self.layout.count.copy(), self.layout.table.copy()
        for array in (count, table):
            by_row = array.reshape(len(self.layers), rows, -1)
            by_row[:, target] = by_row[:, source].copy()
        count.reshape(len(self.layers), rows)[:, source] = 0
        self.layout = replace(self.layout, count=count, table=table)

    def compact(self, table: Tensor, length: Tensor, keep: Tensor) -> Tensor:
        """Drop slots outside `keep` [layers, rows, N]; returns the new lengths [pool's layers, rows] int32.

        `table` [layers, rows, pages] and `length` [layers, rows] are those of all layers; nothing is waited for.
        """
        table, length, keep = (each[self.index] for each in (table, length, keep))
        kept = compact(
            self.tensors["k_pages"],
            self.tensors.get("v_pages"),
            self.tensors["slot_position"],
            self.tensors["slot_mass"],
            table.flatten(0, 1),
            length.flatten(),
            keep.flatten(0, 1),
        )
        return kept.view_as(length)

    def truncate(self, count: Counts) -> None:
        """Give back all but the first `count` [sequences] pages of each sequence."""
        self.layout = self.layout.truncate(count)

    def _replace(self, pages: int) -> None:
        """Tensors of `pages` pages in place of those of an empty pool, which go first and come back if memory fails."""
        for size in (pages, self.layout.capacity):
            self.tensors = {name: self._allocate(name, 0) for name in self._specs}
            try:
                self.tensors = {name: self._allocate(name, size) for name in self._specs}
            except torch.OutOfMemoryError as error:
                reason = str(error)  # and not the error itself, which holds what was allocated before it
            else:
                break
        if size != pages:
            raise torch.OutOfMemoryError(reason)

    def _allocate(self, name: str, pages: int) -> Tensor:
        shape, dtype = self._specs[name]
        if self.runs and len(shape) == 3:
            return torch.empty(shape[0], pages, *shape[1:], dtype=dtype, device=self._device).transpose(0, 1)
        return torch.empty(pages, *shape, dtype=dtype, device=self._device)

    def _copy(self, old: Tensor, source: Pages, new: Tensor, target: Pages) -> None:
        """``new[target] = old[source]``; within one tensor, no target is anybody's source."""
        dim = 0
        if self.runs and old.dim() == 4:  # along the storage's own order, several times faster
            old, new, dim = old.transpose(0, 1), new.transpose(0, 1), 1
        step = max(1, _CHUNK_BYTES * old.shape[dim] // max(1, old.nbytes))
        for at in range(0, source.size, step):
            index = torch.from_numpy(np.stack([source[at : at + step], target[at : at + step]])).to(old.device)
            new.index_copy_(dim, index[1].long(), old.index_select(dim, index[0]))
