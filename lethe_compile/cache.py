"""The paged KV cache: reserves pages ahead of the steps, compacts after a round, and gives emptied pages back.

Everything here runs on the host between steps; a step sees only the tensors of `KVCache.inputs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lethe_compile.allocator import Counts
from lethe_compile.errors import ConfigError, InputError, OutOfPagesError
from lethe_compile.kernels.compact.reference import compact
from lethe_compile.pool import Geometry, Plan, Pool

__all__ = ["Geometry", "KVCache"]

_SLACK = 16  # where growing may copy a sequence, it takes at least 1/16 of its length

_Tokens = TypeVar("_Tokens", int, Counts)


class KVCache:
    """Keys, values, positions and masses of every layer and row, in pages that pools share out.

    Layers of equal geometry share a pool. Slot j of (layer, row) is page ``page_table[layer, row, j // page]``, offset
    ``j % page``; unused table entries are 0, a valid page. A newly given slot holds garbage, NaN included, in all four
    tensors until the attention op writes it: whoever reads slots must mask those beyond `length`.

    Args:
        geometries: one per layer, in graph order.
        page_size: tokens per page.
        contiguous: the pages of each (layer, row) are consecutive; default on a CPU. Pages then move as sequences grow,
            and a pool used to less than half shrinks. Otherwise pages come from anywhere and pools only grow.
        max_bytes: limit of `pool_bytes`; while a pool is rebuilt, one of its tensors exists twice beyond that.

    Raises:
        ConfigError: no layer, or `max_bytes` is less than one page of each pool.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        *,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        contiguous: bool | None = None,
        max_bytes: int | None = None,
    ) -> None:
        if not geometries:
            raise ConfigError("a KV cache needs the geometry of at least one layer")
        self.page_size, self.max_bytes = page_size, max_bytes
        self.device = torch.device(device)
        self.contiguous = self.device.type == "cpu" if contiguous is None else contiguous
        distinct = list(dict.fromkeys(geometries))
        self.pool_of_layer = [distinct.index(geometry) for geometry in geometries]
        self._pools = [
            Pool(
                geometry,
                [layer for layer, pool in enumerate(self.pool_of_layer) if pool == index],
                page_size=page_size,
                dtype=dtype,
                device=self.device,
                runs=self.contiguous,
            )
            for index, geometry in enumerate(distinct)
        ]
        least = sum(pool.page_bytes for pool in self._pools)
        if max_bytes is not None and max_bytes < least:
            raise ConfigError(f"max_bytes={max_bytes} is not allowed: one page of each pool takes {least} bytes")
        self.length = torch.zeros(len(geometries), 0, dtype=torch.int32, device=self.device)
        self.page_table = torch.zeros(len(geometries), 0, 0, dtype=torch.int32, device=self.device)
        self.begin(0)

    # ------------------------------------------------------------------------------------------------ generation

    def begin(self, rows: int, max_tokens_hint: int = 0) -> None:
        """Start a generation of `rows` sequences with an empty cache; figures start anew.

        `max_tokens_hint` tokens per layer and row are made room for at once, as far as `max_bytes` allows, and pools do
        not shrink below that. Tensors of the generation before are used again where they fit.
        """
        shape = (len(self.pool_of_layer), rows)
        self.rows = rows
        self.lengths = np.zeros(shape, np.int64)  # `length` as the host knows it
        if self.length.shape == shape:
            self.length.zero_()
        else:
            self.length = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.bytes_peak = self.bytes_freed = self.pool_bytes_peak = 0
        self._sampled = self._samples = 0
        hint = self._pages(max_tokens_hint)
        for pool in self._pools:
            pool.begin(rows, len(pool.layers) * rows * hint)
        self._adopt([pool.layout.count for pool in self._pools])
        self._upload(hint)

    def reserve(self, tokens: int, active: Sequence[bool] | None = None) -> None:
        """Make sure that `tokens` more fit into every layer of every active row; uploads the table if it changed.

        Raises:
            OutOfPagesError: `max_bytes` forbids it; nothing has changed and the cache stays usable.
        """
        self.reserve_rows([tokens] * self.rows if active is None else [tokens if on else 0 for on in active])

    def reserve_rows(self, tokens_per_row: Sequence[int]) -> None:
        """`reserve` with a number of tokens for each row, as a ragged prefill needs; 0 leaves a row as it is."""
        tokens = self._per_row(tokens_per_row)
        held = self.pages_held()
        need = np.where(tokens > 0, self._pages(self.lengths + tokens), 0)  # [layers, rows]
        if (need > held).any():
            count = np.maximum(need, held)
            if self.contiguous:
                slack = np.maximum(tokens, self.lengths // _SLACK)
                eager = np.where(need > held, self._pages(self.lengths + slack), held)
                count = eager if self._fits(self._split(eager)) else count
            self._adopt(self._split(count))
            self.bytes_peak = max(self.bytes_peak, self.bytes_in_use)
        self._upload()

    def advance(self, new_lengths: Sequence[int]) -> None:
        """A step has appended `new_lengths[row]` tokens to every layer, `length` on the device included: follow it.

        Raises:
            InputError: more tokens than were reserved.
        """
        lengths = self.lengths + self._per_row(new_lengths)
        if (self._pages(lengths) > self.pages_held()).any():
            raise InputError(f"a step appended {list(new_lengths)} tokens to pages that were not reserved for them")
        self.lengths = lengths
        self._sampled += self.bytes_in_use
        self._samples += 1

    def free_rows(self, rows: Iterable[int]) -> None:
        """Empty the given rows in every layer; their pages go back to the pools and the rows can be filled again."""
        index = sorted(set(rows))
        self.lengths[:, index] = 0
        self.length[:, index] = 0
        held = self.pages_held()
        held[:, index] = 0
        self._truncate(held)

    def end(self) -> None:
        """Give back all pages. Figures stay to be read, and the pools' tensors for the next generation."""
        self.free_rows(range(self.rows))

    # -------------------------------------------------------------------------------------------------- a round

    def layer_state(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(mass [rows, N] float32, position [rows, N] int32, length [rows] int64), N the longest row of the layer.

        Beyond a row's length mass is 0 and position -1.
        """
        tensors = self._pool(layer).tensors
        tokens = int(self.lengths[layer].max(initial=0))
        pages = self.page_table[layer, :, : self._pages(tokens)]  # [rows, pages]
        beyond = torch.arange(tokens, device=self.device) >= self.length[layer][:, None]
        mass = tensors["slot_mass"][pages].flatten(1)[:, :tokens].masked_fill(beyond, 0)
        position = tensors["slot_position"][pages].flatten(1)[:, :tokens].masked_fill(beyond, -1)
        return mass, position, self.length[layer].long()

    def compact(self, layer: int, keep: Tensor) -> None:
        """Drop the slots of `layer` outside `keep` [rows, N] bool, N at least its longest row, and free emptied pages.

        A row that loses a token also gives back what it had reserved. The page table is uploaded by the next `reserve`
        or `inputs`, once for all layers; until then its surplus entries are stale but within the pool.

        Raises:
            InputError: `keep` has another number of rows, or is too short.
        """
        old = self.lengths[layer]
        if keep.shape[0] != self.rows or keep.shape[1] < old.max(initial=0):
            raise InputError(
                f"keep of layer {layer} is {list(keep.shape)}: must be [{self.rows}, >= {old.max(initial=0)}]"
            )
        tensors = self._pool(layer).tensors
        length = compact(
            tensors["k_pages"],
            tensors["v_pages"],
            tensors["slot_position"],
            tensors["slot_mass"],
            self.page_table[layer],
            self.length[layer],
            keep,
        )
        self.length[layer] = length
        new = length.cpu().numpy().astype(np.int64)
        emptied = self._pages(old) - self._pages(new)
        self.bytes_freed += int(emptied.sum()) * self._pool(layer).kv_bytes
        held = self.pages_held()
        held[layer] = np.where(new < old, self._pages(new), held[layer])
        self.lengths[layer] = new
        self._truncate(held)

    def inputs(self) -> dict[str, Tensor]:
        """The graph's state inputs: ``k_pages_g, v_pages_g, slot_position_g, slot_mass_g`` of each pool g, then
        ``page_table [layers, rows, max_pages]`` and ``length [layers, rows]``, int32.

        Ask again after each `reserve`: it may have replaced any of them but `length`.
        """
        self._upload()
        state = {f"{name}_{g}": t for g, pool in enumerate(self._pools) for name, t in pool.tensors.items()}
        return {**state, "page_table": self.page_table, "length": self.length}

    # ------------------------------------------------------------------------------------------------- figures

    @property
    def bytes_in_use(self) -> int:
        """Keys and values of the pages that sequences hold now."""
        return sum(pool.layout.used * pool.kv_bytes for pool in self._pools)

    @property
    def overhead_bytes(self) -> int:
        """Positions and masses of those pages, the page table, and the lengths."""
        slots = sum(pool.layout.used * (pool.page_bytes - pool.kv_bytes) for pool in self._pools)
        return slots + self.page_table.nbytes + self.length.nbytes

    @property
    def bytes_mean(self) -> float:
        """Mean of `bytes_in_use` over the steps of this generation."""
        return self._sampled / self._samples if self._samples else 0.0

    @property
    def pool_bytes(self) -> int:
        """Storage of the pools' tensors as it is, held or free."""
        return sum(pool.bytes for pool in self._pools)

    def pages_held(self) -> Counts:
        """[layers, rows] pages held, those that are only reserved included."""
        held = np.zeros_like(self.lengths)
        for pool in self._pools:
            held[pool.layers] = pool.layout.count.reshape(-1, self.rows)
        return held

    def pages_filled(self) -> Counts:
        """[layers, rows] pages that hold at least one token."""
        return self._pages(self.lengths)

    def stats(self) -> dict[str, Any]:
        """Plain numbers for a report. Bytes are of keys and values, but for `overhead_bytes` and the pools'.

        `bytes_freed` counts pages emptied by `compact`, not those that were only reserved; `pool_bytes_peak` includes
        the copies made while pools were rebuilt; `lengths` and `pages` are ``[layers][rows]``.
        """
        return {
            "bytes_in_use": self.bytes_in_use,
            "bytes_peak": self.bytes_peak,
            "bytes_mean": self.bytes_mean,
            "bytes_freed": self.bytes_freed,
            "overhead_bytes": self.overhead_bytes,
            "pool_bytes": self.pool_bytes,
            "pool_bytes_peak": self.pool_bytes_peak,
            "page_size": self.page_size,
            "lengths": self.lengths.tolist(),
            "pages": self.pages_held().tolist(),
        }

    # ------------------------------------------------------------------------------------------------ internals

    def _pool(self, layer: int) -> Pool:
        return self._pools[self.pool_of_layer[layer]]

    def _pages(self, tokens: _Tokens) -> _Tokens:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def _per_row(self, values: Sequence[int]) -> Counts:
        array = np.asarray(values, np.int64)
        if array.shape != (self.rows,) or (array < 0).any():
            raise InputError(f"{list(values)} is not a number of tokens >= 0 for each of {self.rows} rows")
        return array

    def _split(self, pages: Counts) -> list[Counts]:
        """[layers, rows] as one flat [sequences] array per pool."""
        return [pages[pool.layers].ravel() for pool in self._pools]

    def _truncate(self, pages: Counts) -> None:
        for pool, count in zip(self._pools, self._split(pages), strict=True):
            pool.truncate(count)
        self._stale = True

    def _bytes(self, pages: Iterable[int]) -> int:
        """Of pools with so many pages each, positions and masses included."""
        return sum(n * pool.page_bytes for n, pool in zip(pages, self._pools, strict=True))

    def _fits(self, counts: Sequence[Counts]) -> bool:
        return self.max_bytes is None or self._bytes(int(count.sum()) for count in counts) <= self.max_bytes

    def _adopt(self, counts: Sequence[Counts]) -> None:
        """Make every pool hold `counts` [sequences] pages, or raise before the first is touched."""
        plans = self._plan(counts)
        self._stale = True  # the page table on the device is no longer what the layouts say
        growth = [plan.layout.capacity - pool.layout.capacity for plan, pool in zip(plans, self._pools, strict=True)]
        for index in np.argsort(growth, kind="stable"):  # what shrinks makes room for what grows
            pool = self._pools[index]
            others = self.pool_bytes - pool.bytes
            self.pool_bytes_peak = max(self.pool_bytes_peak, others + pool.adopt(plans[index]))

    def _plan(self, counts: Sequence[Counts]) -> list[Plan]:
        needs = [max(1, int(count.sum())) for count in counts]
        if not self._fits(counts):
            raise OutOfPagesError(
                f"the KV cache needs {self._bytes(needs)} bytes for {sum(needs)} pages of {self.page_size} tokens, but"
                f" max_bytes is {self.max_bytes}. Run fewer or shorter sequences, prune harder (a smaller max_tokens,"
                " budget or sparse_ratio), or raise max_bytes"
            )
        layouts = [pool.extend(count) for pool, count in zip(self._pools, counts, strict=True)]
        sizes = [
            layout.capacity if layout else pool.roomy(count)
            for pool, layout, count in zip(self._pools, layouts, counts, strict=True)
        ]
        if self.max_bytes is not None and self._bytes(sizes) > self.max_bytes:
            # Every pool gets what it needs; what is left is shared in proportion to the room each asked for.
            spare, asked = self.max_bytes - self._bytes(needs), self._bytes(sizes) - self._bytes(needs)
            sizes = [need + (size - need) * spare // asked for need, size in zip(needs, sizes, strict=True)]
        return [
            Plan(layout, fresh=False) if layout and layout.capacity == size else pool.rebuild(count, size)
            for pool, layout, count, size in zip(self._pools, layouts, counts, sizes, strict=True)
        ]

    def _upload(self, width: int = 0) -> None:
        """Write the page table to the device if it changed; it widens by more than asked, so that it seldom does."""
        if not self._stale:
            return
        width = max(1, width, *(pool.layout.table.shape[1] for pool in self._pools))
        shape = self.lengths.shape
        if self.page_table.shape[:2] != shape or self.page_table.shape[2] < width:
            width = -(-width * 5 // 32) * 8  # a quarter more, in eights
            self.page_table = torch.empty(*shape, width, dtype=torch.int32, device=self.device)
        table = np.zeros(self.page_table.shape, np.int32)
        for pool in self._pools:
            ids = np.where(pool.layout.held(), pool.layout.table, 0)
            table[pool.layers, :, : ids.shape[1]] = ids.reshape(len(pool.layers), self.rows, ids.shape[1])
        self.page_table.copy_(torch.from_numpy(table))
        self._stale = False
