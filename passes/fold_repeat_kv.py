"""Fold `repeat_kv`: grouped-query attention reads each KV head once, so copies of it made for the product go away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from lethe_compile.passes.base import Note, PassResult, refuse
from lethe_compile.passes.program import Program, argument, is_call, remove_dead, same_size, shape_of, with_cache_groups

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldRepeatKV:
    """Give each site its keys and values before they are repeated over the query group.

    =====================================================================  =============
    before, for key and value alike                                        after
    =====================================================================  =============
    ``reshape(expand(unsqueeze(x, 2), [B, Hkv, G, T, D]), [B, H, T, D])``  ``x``
    ``repeat_interleave(x, G, dim=1)``                                     ``x``
    =====================================================================  =============

    Condition: query head h reads KV head ``h // G``, as both spellings give; `repeat` tiles (``h % Hkv``) and stays.
    Key and value must fold alike.
    """

    name: ClassVar[str] = "fold-repeat-kv"

    def run(self, program: Program) -> PassResult:
        sites, matches, refusals = [], [], []
        for site in program.sites:
            key, value = (_unrepeated(operand) for operand in site.node.args[1:3])
            if (key is None) != (value is None):
                raise refuse("its keys are repeated over the query group and its values are not", program, site.layer)
            if key is None or value is None:
                if is_call(site.node.args[1], aten.repeat):
                    refusals.append(Note(site.node.name, "KV heads are tiled, not grouped: left expanded", site.layer))
                sites.append(site)
                continue
            site.node.update_arg(1, key)
            site.node.update_arg(2, value)
            kv_heads = int(shape_of(key)[1])
            matches.append(Note(site.node.name, f"{site.heads} heads share {kv_heads} KV heads", site.layer))
            sites.append(replace(site, kv_heads=kv_heads))
        remove_dead(program.graph)
        program.module.recompile()
        return PassResult(replace(program, sites=with_cache_groups(sites)), tuple(matches), tuple(refusals))


def _unrepeated(operand: object) -> fx.Node | None:
    """The node whose heads `operand` repeats in place, or None."""
    if not isinstance(operand, fx.Node):
        return None
    source = operand.args[0] if operand.args else None
    if is_call(operand, aten.contiguous, aten.clone) and isinstance(source, fx.Node):
        return _unrepeated(source)
    if is_call(operand, aten.repeat_interleave.self_int) and argument(operand, 2, "dim") in (1, -3):
        return source if isinstance(source, fx.Node) else None
    if not is_call(operand, aten.reshape, aten.view, aten._unsafe_view) or not is_call(source, aten.expand, aten.clone):
        return None
    expand = source.args[0] if is_call(source, aten.clone) else source
    return _before_expand(operand, expand) if isinstance(expand, fx.Node) and is_call(expand, aten.expand) else None


def _before_expand(operand: fx.Node, expand: fx.Node) -> fx.Node | None:
    unsqueeze = expand.args[0]
    while is_call(unsqueeze, aten.slice):  # x[:, :, None, :, :] leaves full slices behind
        unsqueeze = unsqueeze.args[0]
    if not is_call(unsqueeze, aten.unsqueeze) or unsqueeze.args[1] not in (2, -3):
        return None
    source = unsqueeze.args[0]
    before, middle, after = shape_of(source), shape_of(expand), shape_of(operand)
    grouped = len(before) == 4 and len(middle) == 5 and len(after) == 4 and after[1] == middle[1] * middle[2]
    kept = grouped and same_size(before[1], middle[1]) and same_size(before[3], after[3])
    return source if kept and isinstance(source, fx.Node) else None
