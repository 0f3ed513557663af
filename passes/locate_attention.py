"""Locate attention: every place where queries meet keys becomes one `lethe::attention_site` node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.program import (
    SITE_OP,
    Program,
    Site,
    argument,
    is_call,
    is_symbolic,
    module_path,
    same_size,
    shape_of,
    source_of,
    with_cache_groups,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class LocateAttention:
    """Bring attention of every spelling to one form, in graph order.

    ====================================================================  =====================================
    before                                                                after
    ====================================================================  =====================================
    ``attention_site(q, k, v, mask, …)``, from the attention interface    itself
    ``scaled_dot_product_attention(q, k, v, mask, p, is_causal, …)``      ``attention_site(q, k, v, mask, …)``
    ====================================================================  =====================================

    Conditions: 4-D operands, no dropout, a constant scale, keys as many as queries (a graph without a cache of its own).
    A softmax over a dynamic dimension that belongs to no site is attention that was not understood: the graph is
    refused, as is one with fewer sites than the model says it has layers.
    """

    name: ClassVar[str] = "locate-attention"

    def run(self, program: Program) -> PassResult:
        sites, notes = [], []
        for node in list(program.graph.nodes):
            found_by = "attention interface"
            if is_call(node, aten.scaled_dot_product_attention):
                node, found_by = _from_sdpa(node, len(sites), program.input_ids), "sdpa"
            elif is_call(node, aten.softmax, aten._softmax, aten._safe_softmax):
                _refuse_softmax(node, len(sites))
            if not is_call(node, SITE_OP):
                continue
            site = _site(node, len(sites), found_by)
            sites.append(site)
            notes.append(Note(node.name, f"{found_by}, {site.heads} heads over {site.kv_heads}", site.layer))
        _check_count(program, sites)
        program.module.recompile()
        return PassResult(replace(program, sites=with_cache_groups(sites)), tuple(notes))


def _site(node: fx.Node, layer: int, found_by: str) -> Site:
    query, key, value, _, sinks, scale, softcap, *_ = node.args
    (_, heads, steps, k_dim), (_, kv_heads, keys, _), (_, _, _, v_dim) = map(shape_of, (query, key, value))
    name = module_path(node) or node.name
    fixed = (heads, kv_heads, k_dim, v_dim)
    if any(is_symbolic(size) for size in fixed):
        raise _refusal(node, layer, "heads or head sizes are dynamic", "export the model with these fixed")
    if not is_symbolic(steps) or not is_symbolic(keys):
        raise _refusal(node, layer, f"the sequence is frozen to {steps} queries and {keys} keys", "export it as dynamic")
    if heads % kv_heads:
        raise _refusal(node, layer, f"{heads} query heads do not divide over {kv_heads} KV heads")
    if isinstance(scale, fx.Node):
        raise _refusal(node, layer, "the scale is not a constant")
    return Site(layer, node, name, found_by, heads, kv_heads, k_dim, v_dim, scale, softcap, sinks is not None)


def _from_sdpa(node: fx.Node, layer: int, ids: fx.Node) -> fx.Node:
    """Replace an SDPA node by an `attention_site`."""
    query, key, value = node.args[:3]
    if len(shape_of(query)) != 4 or len(shape_of(key)) != 4:
        raise _refusal(node, layer, f"its query has shape {shape_of(query)}, not [batch, heads, tokens, head_dim]")
    if argument(node, 4, "dropout_p", 0.0):
        raise _refusal(node, layer, "it applies dropout", "call model.eval() before exporting")
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = float(shape_of(query)[-1]) ** -0.5
    mask = argument(node, 3, "attn_mask")
    graph = node.graph
    with graph.inserting_before(node):
        if argument(node, 5, "is_causal", False):
            if not same_size(shape_of(query)[2], shape_of(key)[2]):
                raise _refusal(node, layer, "is_causal aligns unequal queries and keys at the upper left")
            mask = _causal_mask(graph, query.meta["val"].device, ids)
        site = graph.call_function(SITE_OP, (query, key, value, mask, None, scale, None, None, layer))
    site.meta.update(node.meta)
    node.replace_all_uses_with(site)
    graph.erase_node(node)
    return site


def _causal_mask(graph: fx.Graph, device: Any, ids: fx.Node) -> fx.Node:
    """What `is_causal=True` means, as nodes: so that one proof serves every mask."""
    tokens = graph.call_function(aten.sym_size.int, (ids, 1))
    ones = graph.call_function(aten.ones.default, ([tokens, tokens],), {"dtype": torch.bool, "device": device})
    return graph.call_function(aten.tril.default, (ones,))


def _refuse_softmax(node: fx.Node, layer: int) -> None:
    shape, dim = shape_of(node), argument(node, 1, "dim")
    if len(shape) >= 3 and is_symbolic(shape[dim]) and is_symbolic(shape[-1]):
        reason = f"softmax over {tuple(map(str, shape))} looks like attention in a form that is not recognised"
        hint = "use scaled_dot_product_attention, or transformers' attention interface"
        raise _refusal(node, layer, reason, hint)


def _check_count(program: Program, sites: list[Site]) -> None:
    if not sites:
        hint = "is it a decoder? attention must reach the graph as scaled_dot_product_attention or through transformers"
        raise UnsupportedGraphError("no attention was found in the graph", hint=hint)
    if program.expected_layers is not None and program.expected_layers != len(sites):
        found = Counter(site.name for site in sites)
        raise UnsupportedGraphError(
            f"the model has {program.expected_layers} attention layers, {len(sites)} were located: {', '.join(found)}"
        )


def _refusal(node: fx.Node, layer: int, reason: str, hint: str | None = None) -> UnsupportedGraphError:
    return UnsupportedGraphError(reason, layer=layer, node=node.name, where=source_of(node) or None, hint=hint)
