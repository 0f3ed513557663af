"""Keys and values that another cache holds, for a generation that goes on from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lethe_compile.cache import KVCache
from lethe_compile.ledger import Counts


@dataclass(frozen=True)
class Past:
    """Of each layer, in graph order, what it holds of R sequences. Keys are rotated, as the cached op gets them."""

    keys: Sequence[Tensor]  # [R, kv_heads, N, k_dim]; N differs by layer, and is less where a window has cut it
    values: Sequence[Tensor]  # [R, kv_heads, N, v_dim]
    positions: Sequence[Tensor]  # [R, N] int64, in order, -1 where there is no token
    lengths: Tensor  # [R] int64: tokens so far, those that no layer holds any more included

    def fill(self, cache: KVCache, reserve: Counts) -> None:
        """Put it into an empty cache; `reserve` says how many tokens each row of the cache gets room for."""
        cache.reserve_rows(reserve)
        for layer, (keys, values, position) in enumerate(zip(self.keys, self.values, self.positions, strict=True)):
            cache.load(layer, keys, values, position)
