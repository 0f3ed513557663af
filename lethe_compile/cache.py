"""The paged KV cache: reserves pages ahead of the steps, compacts after a round, and gives emptied pages back.

Everything here runs on the host between steps; a step sees only the tensors of `KVCache.inputs`, and no step waits for
the host. In between, the host knows upper bounds: `lengths` counts every token that `assume` was told of, `length` on
the device is the truth, and `compact` or `sync` reads it back. Pages are reserved for the bounds, so that none of it
can be outrun.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.allocator import Counts
from lethe_compile.errors import ConfigError, InputError, OutOfPagesError
from lethe_compile.keep_sets import KeepSets
from lethe_compile.pool import Geometry, Plan, Pool, Staging
from lethe_compile.transfers import Fetched, sent

__all__ = ["Geometry", "KVCache", "Rows"]

_SLACK = 16  # where growing may copy a sequence, it takes at least 1/16 of its length

_Tokens = TypeVar("_Tokens", int, Counts)


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


class KVCache:
    """Keys, values, positions and masses of every layer and row, in pages that pools share out.

    Layers of equal geometry share a pool. Slot j of (layer, row) is page ``page_table[layer, row, j // page]``, offset
    ``j % page``; unused table entries are 0, a valid page. A newly given slot holds garbage, NaN included, in all four
    tensors until the attention op writes it: whoever reads slots must mask those beyond `length`.

    A row is a sequence, or, where KV heads keep tokens of their own, one head of it; see `KeepSets`.

    Args:
        geometries: one per layer, in graph order: of one row.
        page_size: tokens per page.
        contiguous: the pages of each (layer, row) are consecutive; default on a CPU. Pages then move as sequences grow,
            and a pool used to less than half shrinks. Otherwise pages come from anywhere and pools only grow.
        max_bytes: limit of `pool_bytes`; while a pool is rebuilt, one of its tensors exists twice beyond that.
        keep_sets: rows that one sequence has in each layer, default 1. In rows that a layer lacks, it gets no page,
            whatever is reserved.

    Attributes:
        lengths: [layers, rows] retained tokens as the host knows them: never less than `length` on the device.
        generation: changes whenever a tensor of `inputs` was replaced, so that a captured CUDA graph knows it is stale.

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
        keep_sets: KeepSets | None = None,
    ) -> None:
        if not geometries:
            raise ConfigError("a KV cache needs the geometry of at least one layer")
        self.page_size, self.max_bytes = page_size, max_bytes
        self.keep_sets = keep_sets or KeepSets([1] * len(geometries))
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
        self.generation = 0
        self._staging = Staging(self.device)
        self.begin(0)

    # ------------------------------------------------------------------------------------------------ generation

    def begin(self, rows: int, max_tokens_hint: int | Counts = 0) -> None:
        """Start a generation of `rows` sequences with an empty cache; figures start anew.

        `max_tokens_hint` tokens, one number or [layers, rows], are made room for at once, as far as `max_bytes` allows,
        and pools do not shrink below that; where pages are scattered, all that an explicit `max_bytes` allows. Tensors
        of the generation before are used again where they fit.
        """
        shape = (len(self.pool_of_layer), rows)
        self.rows = rows
        self.lengths = np.zeros(shape, np.int64)
        if self.length.shape == shape:
            self.length.zero_()
        else:
            self.length = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.generation += 1
        self.bytes_peak = self.bytes_freed = self.pool_bytes_peak = 0
        self._sampled = self._samples = 0
        self._exhausted = False
        self._there = self.keep_sets.there(rows).astype(np.int64)
        hint = self._pages(np.asarray(max_tokens_hint, np.int64)) * self._there
        floors = [int(hint[pool.layers].sum()) for pool in self._pools]
        if self.max_bytes is not None and not self.contiguous and any(floors):
            floors = [floor * -(-self.max_bytes // self._bytes(floors)) for floor in floors]
        for pool, floor in zip(self._pools, floors, strict=True):
            pool.begin(rows, floor)
        self._adopt([pool.layout.count for pool in self._pools])
        self._upload(int(hint.max(initial=0)))

    def reserve(self, tokens: int, active: Sequence[bool] | None = None) -> None:
        """Make sure that `tokens` more fit into every layer of every active row; uploads the table if it changed.

        Raises:
            OutOfPagesError: `max_bytes` forbids it, or the device has no memory left; every sequence holds what it
                held, and the cache stays usable.
        """
        self.reserve_rows([tokens] * self.rows if active is None else [tokens if on else 0 for on in active])

    def reserve_rows(self, tokens_per_row: Sequence[int] | Counts) -> None:
        """`reserve` with a number of tokens for each row, as a ragged prefill needs; 0 leaves a row as it is."""
        tokens = self._per_row(tokens_per_row)  # [layers, rows]
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

    def assume(self, new_lengths: Sequence[int] | Counts) -> None:
        """A step appends at most `new_lengths[row]` tokens to every layer: the bounds follow, the device is not asked.

        Raises:
            InputError: more tokens than were reserved.
        """
        lengths = self.lengths + self._per_row(new_lengths)
        if (self._pages(lengths) > self.pages_held()).any():
            raise InputError(f"a step appends {list(new_lengths)} tokens to pages that were not reserved for them")
        self.lengths = lengths
        self._sampled += self.bytes_in_use
        self._samples += 1

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
        rows, real = rows[: len(position)], position >= 0
        count = real.sum(1)
        self.lengths[layer, rows.cpu().numpy()] = count.cpu().numpy()
        if (self._pages(self.lengths[layer]) > self.pages_held()[layer]).any():
            raise InputError(f"layer {layer} gets {count.tolist()} tokens, and fewer were reserved")
        self._upload()
        row, column = real.nonzero(as_tuple=True)
        slot = (real.cumsum(1) - 1)[row, column]
        page = self.page_table[layer, rows[row], slot // self.page_size].long()
        offset = slot % self.page_size
        tensors = self._pools[self.pool_of_layer[layer]].tensors
        tensors["k_pages"][page, :, offset] = keys[row, :, column]
        if "v_pages" in tensors:
            tensors["v_pages"][page, :, offset] = values[row, :, column]
        tensors["slot_position"][page, offset] = position[row, column].int()
        tensors["slot_mass"][page, offset] = 0.0
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
        self.lengths[:, index] = 0
        if index[-1] - index[0] == len(index) - 1:  # a list of indices would make the device wait for the host
            self.length[:, index[0] : index[-1] + 1].zero_()
        else:
            self.length[:, index] = 0
        held = self.pages_held()
        held[:, index] = 0
        self._truncate(held)

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
        for pool in self._pools:
            pool.move(source, target, self.rows)
        self._stale = True

    def trim(self) -> None:
        """Give back every page that is only reserved."""
        self._truncate(self.pages_filled())

    def give_back(self, held: Counts) -> None:
        """Give back all pages beyond those `held` [layers, rows] before, as `pages_held` had them."""
        self._truncate(np.minimum(held, self.pages_held()))

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
        table = table[:, :, : self._pages(tokens)]  # [layers, rows, pages]
        gathered = [pool.slots(table, tokens) for pool in self._pools]
        mass, position = gathered[0]
        if len(gathered) > 1:
            shape = (*length.shape, tokens)
            mass, position = mass.new_empty(shape), position.new_empty(shape)
            for pool, (pool_mass, pool_position) in zip(self._pools, gathered, strict=True):
                mass.index_copy_(0, pool.index, pool_mass)
                position.index_copy_(0, pool.index, pool_position)
        beyond = torch.arange(tokens, device=self.device) >= length.unsqueeze(2)
        return mass.masked_fill_(beyond, 0), position.masked_fill_(beyond, -1), length.long()

    def keys(self, layer: int, rows: Rows | None = None) -> Tensor:
        """[rows, N, kv_heads, k_dim] of one layer, 0 beyond a row's length; N as in `scores`. Nothing is waited for."""
        self._upload()
        table, length, longest = self._of(rows)
        tokens = max(1, longest)
        pool = self._pools[self.pool_of_layer[layer]]
        keys = pool.keys(table[layer, :, : self._pages(tokens)], tokens)
        beyond = torch.arange(tokens, device=self.device) >= length[layer].unsqueeze(1)  # [rows, N]
        return keys.masked_fill(beyond[:, :, None, None], 0)

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
        held[:, at] = np.where(new < old, self._pages(new), held[:, at])
        self._truncate(held)
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
        held, needed = self.pages_held(), self._pages(self.lengths + self._per_row(room))
        held[:, at] = np.where(new < old, np.minimum(held, needed)[:, at], held[:, at])
        self._truncate(held)
        dropped: Counts = old - new
        return dropped

    def _drop(self, keep: Tensor | None, rows: Rows | None) -> tuple[Tensor, Tensor]:
        """Launch a compaction: lengths before and after it, [layers, rows] int32 on the device."""
        now = self._of(rows)[1]
        before = now.clone()
        if keep is not None:
            self._check_keep(keep, rows)
            self._upload()
            table = self._of(rows)[0]
            for pool in self._pools:
                now.index_copy_(0, pool.index, pool.compact(table, before, keep))
            if rows is not None:
                self.length.index_copy_(1, rows.on_device, now)
        return before, now

    def _freed(self, old: Counts, new: Counts) -> None:
        emptied = (self._pages(old) - self._pages(new)).sum(1)  # [layers]
        self.bytes_freed += sum(int(emptied[pool.layers].sum()) * pool.kv_bytes for pool in self._pools)

    def limit(self, tokens_per_row: Sequence[int] | Counts, fixed: NDArray[np.bool_] | None = None) -> int:
        """The most tokens that every layer and row may keep so that a reserve of so many more is granted, after `trim`.

        Rows that are `fixed` [rows] keep what they have.

        Raises:
            OutOfPagesError: not even one token each.
        """
        tokens, low, high = self._per_row(tokens_per_row), 0, int(self.lengths.max(initial=0))
        kept = np.zeros(self.rows, np.bool_) if fixed is None else fixed
        while low < high:  # a limit of `high` may fit, and `low` does, or is 0
            middle = (low + high + 1) // 2
            need = self._split(self._pages(np.where(kept, self.lengths, np.minimum(self.lengths, middle)) + tokens))
            low, high = (middle, high) if self._fits(need) else (low, middle - 1)
        if not low:
            raise OutOfPagesError(f"no room for {int(tokens.max(initial=0))} new tokens a row, whatever is evicted")
        return low

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

    @property
    def pages(self) -> tuple[int, int]:
        """(held, free) pages of all pools: free ones as `max_bytes` allows, without it as the pools have them now."""
        held = sum(pool.layout.used for pool in self._pools)
        if self.max_bytes is None:
            return held, sum(pool.layout.capacity for pool in self._pools) - held
        left = self.max_bytes - self._bytes(pool.layout.used for pool in self._pools)
        return held, max(0, left) // min(pool.page_bytes for pool in self._pools)

    def widen(self, tokens: int) -> None:
        """Make the page table wide enough for rows of so many tokens, so that it need not be replaced later."""
        self._stale = True
        self._upload(self._pages(tokens))

    def pages_held(self) -> Counts:
        """[layers, rows] pages held, those that are only reserved included."""
        held = np.zeros_like(self.lengths)
        for pool in self._pools:
            held[pool.layers] = pool.layout.count.reshape(-1, self.rows)
        return held

    def pages_filled(self) -> Counts:
        """[layers, rows] pages that hold at least one token."""
        return self._pages(self.lengths)

    def pages_for(self, tokens: Counts) -> Counts:
        """Pages that hold so many tokens each."""
        return self._pages(tokens)

    def bytes_for(self, tokens: Counts) -> int:
        """Of pools that hold so many tokens [layers, rows] and no more, positions and masses included."""
        pages = self._pages(tokens) * self.keep_sets.there(tokens.shape[1])
        return self._bytes(int(count.sum()) for count in self._split(pages))

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

    def _pages(self, tokens: _Tokens) -> _Tokens:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def _per_row(self, values: Sequence[int] | Counts) -> Counts:
        """[layers, rows] of a number for each row; 0 where a layer lacks the row."""
        array = np.asarray(values, np.int64)
        if array.shape != (self.rows,) or (array < 0).any():
            raise InputError(f"{list(values)} is not a number of tokens >= 0 for each of {self.rows} rows")
        tokens: Counts = array * self._there
        return tokens

    def _check_keep(self, keep: Tensor, rows: Rows | None) -> None:
        _, length, longest = self._of(rows)
        if keep.shape[:2] != length.shape or keep.shape[2] < longest:
            raise InputError(f"keep is {list(keep.shape)}: must be [{', '.join(map(str, length.shape))}, >= {longest}]")

    def _read(self, *tensors: Tensor) -> list[Counts]:
        """The tensors as int64 on the host, in one transfer."""
        host = torch.cat([tensor.reshape(-1).long() for tensor in tensors]).cpu().numpy()
        ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
        return [part.reshape(like.shape).copy() for part, like in zip(np.split(host, ends), tensors, strict=True)]

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
        """Whether `max_bytes` allows so many pages, and the pools have them where the device can give no more."""
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
        self._stale = True  # the page table on the device is no longer what the layouts say
        growth = [plan.layout.capacity - pool.layout.capacity for plan, pool in zip(plans, self._pools, strict=True)]
        for index in np.argsort(growth, kind="stable"):  # what shrinks makes room for what grows
            pool = self._pools[index]
            others = self.pool_bytes - pool.bytes
            self.generation += plans[index].fresh
            self.pool_bytes_peak = max(self.pool_bytes_peak, others + pool.adopt(plans[index]))

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
            f"the KV cache needs {self._bytes(needs)} bytes for {sum(needs)} pages of {self.page_size} tokens, but"
            f" {limit}. Run fewer or shorter sequences, prune harder (a smaller max_tokens, budget or sparse_ratio),"
            " or raise max_bytes"
        )

    def _upload(self, width: int = 0) -> None:
        """Write the page table to the device if it changed; it widens by more than asked, so that it seldom does."""
        if not self._stale:
            return
        width = max(1, width, *(pool.layout.table.shape[1] for pool in self._pools))
        shape = self.lengths.shape
        if self.page_table.shape[:2] != shape or self.page_table.shape[2] < width:
            width = -(-width * 5 // 32) * 8  # a quarter more, in eights
            self.page_table = torch.empty(*shape, width, dtype=torch.int32, device=self.device)
            self.generation += 1
        with self._staging.fill(self.page_table) as table:
            for pool in self._pools:
                ids = pool.layout.table * pool.layout.held()
                table[pool.layers, :, : ids.shape[1]] = ids.reshape(len(pool.layers), self.rows, ids.shape[1])
        self._stale = False
