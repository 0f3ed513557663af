"""Fold `repeat_kv`: grouped-query attention reads each KV head once, so copies of it made for the product go away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.program import (
    Program,
    Site,
    argument,
    is_call,
    operand,
    remove_dead,
    same_sizes,
    shape_of,
    with_cache_groups,
)

aten = torch.ops.aten

_COPIES = (aten.contiguous, aten.clone)
_RESHAPES = (aten.reshape, aten.flatten)


@dataclass(frozen=True)
class FoldRepeatKV:
    """Give each site its keys and values before they are repeated over the query group.

    =====================================================================  ===================
    before, for key and value alike                                        after
    =====================================================================  ===================
    ``reshape(expand(unsqueeze(x, 2), [B, Hkv, G, T, D]), [B, H, T, D])``  ``x``
    ``repeat_interleave(x, G, dim=1)``                                     ``x``
    ``transpose(either of them on [B, T, Hkv, D], 1, 2)``                  ``transpose(x, 1, 2)``
    =====================================================================  ===================

    Conditions: query head h reads KV head ``h // G``, as both spellings give (`repeat` tiles, ``h % Hkv``, and stays),
    and key and value have equally many heads before.
    """

    name: ClassVar[str] = "fold-repeat-kv"

    def run(self, program: Program) -> PassResult:
        sites, matches, refusals = [], [], []
        for site in program.sites:
            key, value = (_unrepeated(argument(site.node, i, name), 1) for i, name in ((1, "key"), (2, "value")))
            if key is not None and value is not None and key.heads == value.heads:
                site = _fold(site, key, value)  # noqa: PLW2901
                matches.append(Note(site.node.name, f"{site.heads} heads share {site.kv_heads} KV heads", site.layer))
            elif (key, value) != (None, None):
                refusals.append(Note(site.node.name, "keys and values are repeated differently: left so", site.layer))
            elif is_call(site.node.args[1], aten.repeat):
                refusals.append(Note(site.node.name, "KV heads are tiled, not grouped: left expanded", site.layer))
            sites.append(site)
        remove_dead(program.graph)
        program.module.recompile()
        return PassResult(replace(program, sites=with_cache_groups(sites)), tuple(matches), tuple(refusals))


@dataclass(frozen=True)
class _Source:
    """What is repeated: a tensor whose dimension `dim`, 1 or 2, is its KV heads."""

    node: fx.Node
    dim: int

    @property
    def heads(self) -> int:
        return int(shape_of(self.node)[self.dim])


def _fold(site: Site, key: _Source, value: _Source) -> Site:
    for index, source in ((1, key), (2, value)):
        node = source.node
        if source.dim == 2:
            with site.node.graph.inserting_before(site.node):
                node = site.node.graph.call_function(aten.transpose.int, (node, 1, 2))
        site.node.update_arg(index, node)
    return replace(site, kv_heads=key.heads)


def _unrepeated(node: object, dim: int) -> _Source | None:
    """What `node` repeats in place along dimension `dim`, or None."""
    if is_call(node, *_COPIES):
        return _unrepeated(operand(node), dim)
    if is_call(node, aten.transpose) and dim == 1 and _dims(node) == {1, 2}:
        return _unrepeated(operand(node), 2)
    source: object = None
    if is_call(node, aten.repeat_interleave.self_int):
        assert isinstance(node, fx.Node)
        source = operand(node) if argument(node, 2, "dim") in (dim, dim - 4) else None
    elif is_call(node, *_RESHAPES):
        source = _before_expand(node, dim)
    return _Source(source, dim) if isinstance(source, fx.Node) else None


def _dims(transpose: object) -> set[int]:
    assert isinstance(transpose, fx.Node)
    return {int(d) % 4 for d in (argument(transpose, 1, "dim0"), argument(transpose, 2, "dim1"))}


def _before_expand(reshape: object, dim: int) -> object:
    """``x`` of ``reshape(expand(unsqueeze(x, dim + 1)))``, when each head of x is repeated in place; else None."""
    expand = operand(reshape)
    while is_call(expand, *_COPIES):
        expand = operand(expand)
    unsqueeze = operand(expand) if is_call(expand, aten.expand) else None
    while is_call(unsqueeze, aten.slice):  # x[:, :, None, :, :] leaves slices behind: full ones, or sizes would differ
        unsqueeze = operand(unsqueeze)
    if unsqueeze is None or not is_call(unsqueeze, aten.unsqueeze) or unsqueeze.args[1] not in (dim + 1, dim - 4):
        return None
    source = operand(unsqueeze)
    before, middle, after = list(shape_of(source)), list(shape_of(expand)), list(shape_of(reshape))
    if len(before) != 4 or len(middle) != 5:
        return None
    group = middle.pop(dim + 1)
    return source if same_sizes(before, middle) and same_sizes(_times(before, dim, group), after) else None


def _times(shape: list[int], dim: int, factor: int) -> list[int]:
    return [size * factor if d == dim else size for d, size in enumerate(shape)]
