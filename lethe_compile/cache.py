"""The paged KV cache: reserves pages ahead of the steps, compacts after a round, and gives emptied pages back.

Everything here runs on the host between steps; a step sees only the tensors of `KVCache.inputs`, and no step waits for
the host. In between, the host knows upper bounds: `lengths` counts every token that `assume` was told of, `length` on
the device is the truth, and `compact` or `sync` reads it back. Pages are reserved for the bounds, so that none of it
can be outrun.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile import slots
from lethe_compile.allocator import Counts
from lethe_compile.errors import InputError
from lethe_compile.keep_sets import KeepSets
from lethe_compile.page_table import PageTable
from lethe_compile.paged_rows import PagedRows
from lethe_compile.pool import Geometry
from lethe_compile.transfers import Fetched, sent


@dataclass(frozen=True)
class Rows:
    """Some rows of a cache, each once, by their indices on the host and on the device."""

    on_host: NDArray[np.int64]
    on_device: Tensor

    @classmethod
    def of(cls, index: Sequence[int] | NDArray[np.int64], device: torch.device) -> Rows:
        """The device is not waited for."""
        host = np.asarray(index, np.int64)
        return cls(host, sent(host, device))


@dataclass(frozen=True)
class Compaction:
    """A compaction under way on the device; see `KVCache.compact_later`."""

    rows: Rows
    bound: Counts  # [layers, rows] tokens before it, as the host bounded them
    lengths: Fetched  # [2, layers, rows]: before, and after


class KVCache(PagedRows):
    """Keys, values, positions and masses of every layer and row, in pages that pools share out.

    Layers of equal geometry share a pool. Slot j of (layer, row) is page ``page_table[layer, row, j // page]``, offset
    ``j % page``; unused table entries are 0, a valid page. A newly given slot holds garbage, NaN included, in all four
    tensors until the attention op writes it: whoever reads slots must mask those beyond `length`.

    Arguments are those of `PagedRows`.

    Attributes:
        lengths: [layers, rows] retained tokens as the host knows them: never less than `length` on the device.
        length: [layers, rows] int32 on the device.
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
        keep_sets: KeepSets | None = None,
    ) -> None:
        super().__init__(
            geometries,
            page_size=page_size,
            dtype=dtype,
            device=device,
            contiguous=contiguous,
            max_bytes=max_bytes,
            keep_sets=keep_sets,
        )
        self.length = torch.zeros(len(geometries), 0, dtype=torch.int32, device=self.device)
        self._lengths_replaced = 0
        self._table = PageTable(len(geometries), self.device)
        self.begin(0)

    @property
    def page_table(self) -> Tensor:
        """[layers, rows, max_pages] int32 on the device."""
        return self._table.tensor

    @property
    def generation(self) -> int:
        """Changes whenever a tensor of `inputs` was replaced, so that a captured CUDA graph knows it is stale."""
        return self._lengths_replaced + self._table.replaced + self._pools.replaced

    # --------------------------------------------------------------------------------------------- rows and their pages

    def begin(self, rows: int, max_tokens_hint: int | Counts = 0) -> None:
        """Start a generation of `rows` sequences with an empty cache; see `PagedRows.begin`."""
        shape = (len(self.pool_of_layer), rows)
        if self.length.shape == shape:
            self.length.zero_()
        else:
            self.length = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._lengths_replaced += 1
        super().begin(rows, max_tokens_hint)
        hint = self.pages_for(np.asarray(max_tokens_hint, np.int64)) * self._there
        self._upload(int(hint.max(initial=0)))

    def reserve_rows(self, tokens_per_row: Sequence[int] | Counts) -> None:
        """As `PagedRows.reserve_rows`; uploads the page table if it changed."""
        super().reserve_rows(tokens_per_row)
        self._upload()

    def widen(self, tokens: int) -> None:
        """Make the page table wide enough for rows of so many tokens, so that it need not be replaced later."""
        self._upload(self.pages_for(tokens))

    def load(self, layer: int, keys: Tensor, values: Tensor, position: Tensor) -> None:
        """Fill the first R sequences of an empty layer with tokens from elsewhere, in order; their masses are 0.

        `keys` are ``[R, kv_heads, N, k_dim]``, `values` ``[R, kv_heads, N, v_dim]``, `position` ``[R, N]``, -1 where
        there is no token; heads that keep tokens of their own get all of them. Waits for the device.

        Raises:
            InputError: more tokens than were reserved.
        """
        rows = torch.from_numpy(np.flatnonzero(self._there[layer])).to(self.device)
        sets = int(self.keep_sets.of_layer[layer])
        keys, values = (each.unflatten(1, (sets, -1)).flatten(0, 1) for each in (keys, values))
        position = position.repeat_interleave(sets, dim=0)  # [rows, N]
        rows = rows[: len(position)]
        count = (position >= 0).sum(1)
        self.lengths[layer, rows.cpu().numpy()] = count.cpu().numpy()
        if (self.pages_for(self.lengths[layer]) > self.pages_held()[layer]).any():
            raise InputError(f"layer {layer} gets {count.tolist()} tokens, and fewer were reserved")
        self._upload()
        slots.fill(self._pools.of(layer), self.page_table[layer, rows], keys, values, position)
        self.length[layer, rows] = count.int()

    def sync(self, *others: Tensor) -> list[Counts]:
        """Read back `length`, and `others`, integer or bool tensors, with it: one wait for the device. Pages stay."""
        self.lengths, *rest = self._read(self.length, *others)
        return rest

    def free_rows(self, rows: Iterable[int]) -> None:
        """Empty the given rows in every layer; their pages go back to the pools and the rows can be filled again."""
        index = sorted(set(rows))
        if not index:
            return
        if index[-1] - index[0] == len(index) - 1:  # a list of indices would make the device wait for the host
            self.length[:, index[0] : index[-1] + 1].zero_()
        else:
            self.length[:, index] = 0
        self._empty(index)

    def move(self, source: slice, target: slice) -> None:
        """What rows `source` hold becomes that of rows `target`, which must be empty; no key or value is copied.

        Raises:
            InputError: a target row holds something.
        """
        if self.pages_held()[:, target].any():
            raise InputError(f"rows {target.start} to {target.stop - 1} hold pages: free them first")
        self.lengths[:, target], self.lengths[:, source] = self.lengths[:, source].copy(), 0
        self.length[:, target] = self.length[:, source].clone()
        self.length[:, source] = 0
        self._pools.move(source, target)

    def end(self) -> None:
        """Give back all pages. Figures stay to be read, and the pools' tensors for the next generation."""
        self.free_rows(range(self.rows))

    # -------------------------------------------------------------------------------------------------- a round

    def scores(self, rows: Rows | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(mass [layers, rows, N] float32, position [layers, rows, N] int32, length [layers, rows] int64).

        N is that of the longest row, as the host bounds it, and at least 1. Beyond a row's length mass is 0 and
        position -1. Of all rows, or of `rows` alone. The device is not waited for.
        """
        self._upload()
        table, length, longest = self._of(rows)
        tokens = max(1, longest)
        return slots.scores(self._pools, table[:, :, : self.pages_for(tokens)], length, tokens)

    def keys(self, layer: int, rows: Rows | None = None) -> Tensor:
        """[rows, N, kv_heads, k_dim] of one layer, 0 beyond a row's length; N as in `scores`. Nothing is waited for."""
        self._upload()
        table, length, longest = self._of(rows)
        tokens = max(1, longest)
        return slots.keys(self._pools.of(layer), table[layer, :, : self.pages_for(tokens)], length[layer], tokens)

    def clear_mass(self, rows: Rows | None = None) -> None:
        """Forget what attention went to: the mass of every token becomes 0, of all rows or of `rows` alone."""
        for pool in self._pools:
            pages = None if rows is None else sent(pool.pages_of(rows.on_host, self.rows), self.device)
            pool.clear_mass(pages)

    def _of(self, rows: Rows | None) -> tuple[Tensor, Tensor, int]:
        """Page table and length of the rows, and the longest of them."""
        if rows is None:
            return self.page_table, self.length, int(self.lengths.max(initial=0))
        index = rows.on_device
        longest = int(self.lengths[:, rows.on_host].max(initial=0))
        return self.page_table.index_select(1, index), self.length.index_select(1, index), longest

    def compact(self, keep: Tensor | None, *others: Tensor, rows: Rows | None = None) -> list[Counts]:
        """Drop the slots outside `keep` [layers, rows, N] bool, N at least the longest row; free emptied pages.

        None drops nothing. With `rows`, of these alone. The device is waited for once, to read the lengths back, and
        `others` with them. A sequence that loses a token also gives back what it had reserved. The page table is
        uploaded by the next `reserve` or `inputs`; until then its surplus entries are stale but within the pool.

        Returns:
            [layers, rows] tokens before (those after are `lengths`), then `others` as the host's int64.

        Raises:
            InputError: `keep` has another number of layers or rows, or is too short.
        """
        before, now = self._drop(keep, rows)
        old, new, *rest = self._read(before, now, *others)
        at: Any = slice(None) if rows is None else rows.on_host
        self._freed(old, new)
        held = self.pages_held()
        held[:, at] = np.where(new < old, self.pages_for(new), held[:, at])
        self._pools.truncate(held)
        self.lengths[:, at] = new
        return [old, *rest]

    def compact_later(self, keep: Tensor | None, rows: Rows) -> Compaction:
        """`compact`, and nothing is waited for: bounds and pages stay as they are until `settle` is given the result.

        Until then the rows must stay where they are, and be compacted no further.

        Raises:
            InputError: as `compact`.
        """
        before, now = self._drop(keep, rows)
        return Compaction(rows, self.lengths[:, rows.on_host].copy(), Fetched(torch.stack([before, now])))

    def settle(self, done: Compaction, room: Sequence[int] | Counts) -> Counts:
        """Take over what `compact_later` did: the rows keep `room` [rows] tokens beyond what they hold, as far as that
        is reserved, and give back the other pages. Tokens that steps have appended since are counted in.

        Returns:
            [layers, its rows] tokens that were dropped.
        """
        old, new = done.lengths.wait()
        at = done.rows.on_host
        self.lengths[:, at] -= done.bound - new
        self._freed(old, new)
        held, needed = self.pages_held(), self.pages_for(self.lengths + self._per_row(room))
        held[:, at] = np.where(new < old, np.minimum(held, needed)[:, at], held[:, at])
        self._pools.truncate(held)
        dropped: Counts = old - new
        return dropped

    def _drop(self, keep: Tensor | None, rows: Rows | None) -> tuple[Tensor, Tensor]:
        """Launch a compaction: lengths before and after it, [layers, rows] int32 on the device."""
        now = self._of(rows)[1]
        before = now.clone()
        if keep is not None:
            self._check_keep(keep, rows)
            self._upload()
            slots.close_up(self._pools, self._of(rows)[0], before, keep, into=now)
            if rows is not None:
                self.length.index_copy_(1, rows.on_device, now)
        return before, now

    def _freed(self, old: Counts, new: Counts) -> None:
        self.bytes_freed += self._pools.kv_bytes_of((self.pages_for(old) - self.pages_for(new)).sum(1))

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
    def overhead_bytes(self) -> int:
        """Positions and masses of the pages that sequences hold now, the page table, and the lengths."""
        return self._pools.beside_bytes + self.page_table.nbytes + self.length.nbytes

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

    def _check_keep(self, keep: Tensor, rows: Rows | None) -> None:
        _, length, longest = self._of(rows)
        if keep.shape[:2] != length.shape or keep.shape[2] < longest:
            raise InputError(f"keep is {list(keep.shape)}: must be [{', '.join(map(str, length.shape))}, >= {longest}]")

    def _read(self, *tensors: Tensor) -> list[Counts]:
        """The tensors as int64 on the host, in one transfer."""
        host = torch.cat([tensor.reshape(-1).long() for tensor in tensors]).cpu().numpy()
        ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
        return [part.reshape(like.shape).copy() for part, like in zip(np.split(host, ends), tensors, strict=True)]

    def _upload(self, width: int = 0) -> None:
        """Write the page table to the device if it changed, or is to be wider."""
        self._table.upload(self._pools, self.rows, width)
