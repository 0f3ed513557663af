"""Rows of tokens in pages, as the host counts them: what they may hold, what is reserved for them, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lethe_compile.allocator import Counts
from lethe_compile.errors import InputError, OutOfPagesError
from lethe_compile.keep_sets import KeepSets
from lethe_compile.pool import Geometry
from lethe_compile.pools import Pools

_SLACK = 16  # where growing may copy a sequence, it takes at least 1/16 of its length

_Tokens = TypeVar("_Tokens", int, Counts)


class PagedRows:
    """Rows of every layer, and the pages that are reserved for bounds on their lengths. The device is not asked.

    A row is a sequence, or, where KV heads keep tokens of their own, one head of it; see `KeepSets`.

    Args:
        geometries: one per layer, in graph order: of one row.
        page_size: tokens per page.
        contiguous: the pages of each (layer, row) are consecutive; default on a CPU; see `Pools`.
        max_bytes: limit of `pool_bytes`; see `Pools`.
        keep_sets: rows that one sequence has in each layer, default 1. In rows that a layer lacks, it gets no page,
            whatever is reserved.

    Attributes:
        rows: as `begin` was told.
        lengths: [layers, rows] tokens, at most.
        pool_of_layer: index of each layer's pool.
        bytes_peak: the most `bytes_in_use` since `begin`.
        bytes_freed: keys and values of pages emptied since then, not of those that were only reserved.

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
        self.page_size, self.device = page_size, torch.device(device)
        self.contiguous = self.device.type == "cpu" if contiguous is None else contiguous
        self._pools = Pools(
            geometries,
            page_size=page_size,
            dtype=dtype,
            device=self.device,
            runs=self.contiguous,
            max_bytes=max_bytes,
        )
        self.keep_sets = keep_sets or KeepSets([1] * len(geometries))
        self.pool_of_layer = self._pools.of_layer

    @property
    def max_bytes(self) -> int | None:
        """Limit of `pool_bytes`, None for what the device has."""
        return self._pools.max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int | None) -> None:
        self._pools.max_bytes = value

    # ---------------------------------------------------------------------------------------------------- reservation

    def begin(self, rows: int, max_tokens_hint: int | Counts = 0) -> None:
        """Start a generation of `rows` rows that hold nothing; figures start anew.

        `max_tokens_hint` tokens, one number or [layers, rows], are made room for at once, as far as `max_bytes` allows,
        and pools do not shrink below that; where pages are scattered, all that an explicit `max_bytes` allows. Tensors
        of the generation before are used again where they fit.
        """
        self.rows = rows
        self.lengths = np.zeros((len(self.pool_of_layer), rows), np.int64)
        self.bytes_peak = self.bytes_freed = 0
        self._sampled = self._samples = 0
        self._there = self.keep_sets.there(rows).astype(np.int64)
        self._pools.begin(rows, self.pages_for(np.asarray(max_tokens_hint, np.int64)) * self._there)

    def reserve(self, tokens: int, active: Sequence[bool] | None = None) -> None:
        """Make sure that `tokens` more fit into every layer of every active row.

        Raises:
            OutOfPagesError: `max_bytes` forbids it, or the device has no memory left; every sequence holds what it
                held, and the cache stays usable.
        """
        self.reserve_rows([tokens] * self.rows if active is None else [tokens if on else 0 for on in active])

    def reserve_rows(self, tokens_per_row: Sequence[int] | Counts) -> None:
        """`reserve` with a number of tokens for each row, as a ragged prefill needs; 0 leaves a row as it is."""
        tokens = self._per_row(tokens_per_row)  # [layers, rows]
        held = self.pages_held()
        need = np.where(tokens > 0, self.pages_for(self.lengths + tokens), 0)  # [layers, rows]
        if (need > held).any():
            count = np.maximum(need, held)
            if self.contiguous:
                slack = np.maximum(tokens, self.lengths // _SLACK)
                eager = np.where(need > held, self.pages_for(self.lengths + slack), held)
                count = eager if self._pools.fits(eager) else count
            self._pools.hold(count)
            self.bytes_peak = max(self.bytes_peak, self.bytes_in_use)

    def assume(self, new_lengths: Sequence[int] | Counts) -> None:
        """A step appends at most `new_lengths[row]` tokens to every layer: the bounds follow, the device is not asked.

        Raises:
            InputError: more tokens than were reserved.
        """
        lengths = self.lengths + self._per_row(new_lengths)
        if (self.pages_for(lengths) > self.pages_held()).any():
            raise InputError(f"a step appends {list(new_lengths)} tokens to pages that were not reserved for them")
        self.lengths = lengths
        self._sampled += self.bytes_in_use
        self._samples += 1

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
            need = self.pages_for(np.where(kept, self.lengths, np.minimum(self.lengths, middle)) + tokens)
            low, high = (middle, high) if self._pools.fits(need) else (low, middle - 1)
        if not low:
            raise OutOfPagesError(f"no room for {int(tokens.max(initial=0))} new tokens a row, whatever is evicted")
        return low

    def trim(self) -> None:
        """Give back every page that is only reserved."""
        self._pools.truncate(self.pages_filled())

    def give_back(self, held: Counts) -> None:
        """Give back all pages beyond those `held` [layers, rows] before, as `pages_held` had them."""
        self._pools.truncate(np.minimum(held, self.pages_held()))

    def _empty(self, index: Sequence[int]) -> None:
        """The given rows hold nothing any more; their pages go back to the pools."""
        self.lengths[:, index] = 0
        held = self.pages_held()
        held[:, index] = 0
        self._pools.truncate(held)

    # --------------------------------------------------------------------------------------------------------- figures

    @property
    def bytes_in_use(self) -> int:
        """Keys and values of the pages that sequences hold now."""
        return self._pools.kv_bytes

    @property
    def bytes_mean(self) -> float:
        """Mean of `bytes_in_use` over the steps of this generation."""
        return self._sampled / self._samples if self._samples else 0.0

    @property
    def pool_bytes(self) -> int:
        """Storage of the pools' tensors as it is, held or free."""
        return self._pools.bytes

    @property
    def pool_bytes_peak(self) -> int:
        """The most of it since `begin`, the copies made while pools were rebuilt included."""
        return self._pools.bytes_peak

    @property
    def pages(self) -> tuple[int, int]:
        """(held, free) pages of all pools: free ones as `max_bytes` allows, without it as the pools have them now."""
        return self._pools.pages

    def pages_held(self) -> Counts:
        """[layers, rows] pages held, those that are only reserved included."""
        return self._pools.held()

    def pages_filled(self) -> Counts:
        """[layers, rows] pages that hold at least one token."""
        return self.pages_for(self.lengths)

    def pages_for(self, tokens: _Tokens) -> _Tokens:
        """Pages that hold so many tokens, or so many each."""
        return -(-tokens // self.page_size)

    def bytes_for(self, tokens: Counts) -> int:
        """Of pools that hold so many tokens [layers, rows] and no more, positions and masses included."""
        return self._pools.bytes_of(self.pages_for(tokens) * self.keep_sets.there(tokens.shape[1]))

    def _per_row(self, values: Sequence[int] | Counts) -> Counts:
        """[layers, rows] of a number for each row; 0 where a layer lacks the row."""
        array = np.asarray(values, np.int64)
        if array.shape != (self.rows,) or (array < 0).any():
            raise InputError(f"{list(values)} is not a number of tokens >= 0 for each of {self.rows} rows")
        tokens: Counts = array * self._there
        return tokens
