"""What lies in the slots of a cache, on the device: read, written, and closed up. Nothing here waits for it.

Slot j of (layer, row) is page ``table[layer, row, j // page]``, offset ``j % page``. What a slot beyond `length` holds
is garbage, NaN included, and is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lethe_compile.pool import Pool
from lethe_compile.pools import Pools


def scores(pools: Pools, table: Tensor, length: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mass and position [layers, rows, tokens], 0 and -1 beyond length, and `length` as int64."""
    gathered = [pool.slots(table, tokens) for pool in pools]
    mass, position = gathered[0]
    if len(gathered) > 1:
        shape = (*length.shape, tokens)
        mass, position = mass.new_empty(shape), position.new_empty(shape)
        for pool, (pool_mass, pool_position) in zip(pools, gathered, strict=True):
            mass.index_copy_(0, pool.index, pool_mass)
            position.index_copy_(0, pool.index, pool_position)
    beyond = torch.arange(tokens, device=table.device) >= length.unsqueeze(2)
    return mass.masked_fill_(beyond, 0), position.masked_fill_(beyond, -1), length.long()


def keys(pool: Pool, table: Tensor, length: Tensor, tokens: int) -> Tensor:
    """Keys [rows, tokens, kv_heads, k_dim] of one layer, whose table [rows, pages] and length [rows] are given."""
    found = pool.keys(table, tokens)
    beyond = torch.arange(tokens, device=table.device) >= length.unsqueeze(1)  # [rows, tokens]
    return found.masked_fill(beyond[:, :, None, None], 0)


def close_up(pools: Pools, table: Tensor, length: Tensor, keep: Tensor, into: Tensor) -> None:
    """Drop the slots outside `keep` [layers, rows, N]; `into` gets the new lengths [layers, rows]."""
    for pool in pools:
        into.index_copy_(0, pool.index, pool.compact(table, length, keep))


def fill(pool: Pool, table: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    """Write the tokens of one layer, whose table [rows, pages] is given, in order; their masses are 0.

    `keys` and `values` are ``[rows, kv_heads, N, dim]``, `position` ``[rows, N]``, -1 where there is no token.
    """
    real = position >= 0
    row, column = real.nonzero(as_tuple=True)
    slot = (real.cumsum(1) - 1)[row, column]
    tensors = pool.tensors
    page_size = tensors["slot_position"].shape[1]
    page = table[row, slot // page_size].long()
    offset = slot % page_size
    tensors["k_pages"][page, :, offset] = keys[row, :, column]
    if "v_pages" in tensors:
        tensors["v_pages"][page, :, offset] = values[row, :, column]
    tensors["slot_position"][page, offset] = position[row, column].int()
    tensors["slot_mass"][page, offset] = 0.0
