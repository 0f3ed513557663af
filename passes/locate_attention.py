"""Locate attention: every place where queries meet keys becomes one `lethe::attention_site` node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.mask_terms import split_mask
from lethe_compile.passes.program import (
    SITE_OP,
    SOFTMAX,
    Program,
    Site,
    argument,
    attribute,
    is_call,
    is_symbolic,
    may_be_attention,
    module_path,
    remove_dead,
    same_size,
    shape_of,
    source_of,
    with_cache_groups,
)
from lethe_compile.passes.reading import NotAttention
from lethe_compile.passes.softmax_attention import locate

aten = torch.ops.aten

_HINT = "use scaled_dot_product_attention, or transformers' attention interface"


@dataclass(frozen=True)
class LocateAttention:
    """Bring attention of every spelling to one form, in graph order.

    ====================================================================  =====================================
    before                                                                after
    ====================================================================  =====================================
    ``attention_site(q, k, v, mask, …)``, from the attention interface    itself
    ``scaled_dot_product_attention(q, k, v, mask, p, is_causal, …)``      ``attention_site(q, k, v, mask, …)``
    ``matmul(softmax(cap(q @ k.mT * scale) + bias + mask), v)``           ``attention_site(q, k, v, mask, bias, …)``
    ====================================================================  =====================================

    Conditions: 4-D operands, no dropout, a constant scale, queries and keys one for each token of the input (a graph
    without a cache of its own). A softmax over a dynamic dimension that belongs to no site, or another operator that
    calls itself attention, was not understood: the graph is refused, as is one with another number of sites than the
    model says it has layers.
    """

    name: ClassVar[str] = "locate-attention"

    def run(self, program: Program) -> PassResult:
        sites: list[Site] = []
        for node in list(program.graph.nodes):
            layer = len(sites)
            if is_call(node, SITE_OP):
                sites.append(_site(program, node, layer, "interface"))
            elif is_call(node, aten.scaled_dot_product_attention):
                sites.append(_site(program, _from_sdpa(program, node, layer), layer, "sdpa"))
            elif node.users and is_call(node, *SOFTMAX) and may_be_attention(node):
                sites.append(_site(program, _from_softmax(program, node, layer), layer, "softmax"))
            else:
                _refuse_unknown(program, node, layer)
        remove_dead(program.graph)
        _check_count(program, sites)
        program.module.recompile()
        notes = [Note(s.node.name, f"{s.found_by}, {s.heads} heads over {s.kv_heads}", s.layer) for s in sites]
        return PassResult(replace(program, sites=with_cache_groups(sites)), tuple(notes))


def _site(program: Program, node: fx.Node, layer: int, found_by: str) -> Site:
    query, key, value, _, sinks, _, scale, softcap, *_ = node.args
    (_, heads, queries, k_dim), (_, kv_heads, keys, _), (_, _, _, v_dim) = map(shape_of, (query, key, value))
    tokens = shape_of(program.input_ids)[1]
    if any(is_symbolic(size) for size in (heads, kv_heads, k_dim, v_dim)):
        raise _refusal(node, layer, "heads or head sizes are dynamic", "export the model with these fixed")
    if not is_symbolic(queries) or not is_symbolic(keys):
        reason = f"the sequence is frozen to {queries} queries and {keys} keys"
        raise _refusal(node, layer, reason, "export it with dynamic tokens")
    if not same_size(queries, tokens) or not same_size(keys, tokens):
        reason = f"{queries} queries meet {keys} keys, where the input has {tokens} tokens"
        raise _refusal(node, layer, reason, "give the model without a cache of its own")
    if heads % kv_heads:
        raise _refusal(node, layer, f"{heads} query heads do not divide over {kv_heads} KV heads")
    if not isinstance(scale, float):
        raise _refusal(node, layer, "the scale is not a constant")
    if softcap is not None and not isinstance(softcap, float):
        raise _refusal(node, layer, "the softcap is not a constant")
    name = module_path(node) or node.name
    return Site(layer, node, name, found_by, heads, kv_heads, k_dim, v_dim, scale, softcap, sinks is not None)


def _from_sdpa(program: Program, node: fx.Node, layer: int) -> fx.Node:
    """Replace an SDPA node by an `attention_site`."""
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if len(shape_of(operand)) != 4:
            shape = ", ".join(map(str, shape_of(operand)))
            raise _refusal(node, layer, f"its {name} is [{shape}], not [batch, heads, tokens, head_dim]")
    if argument(node, 4, "dropout_p", 0.0):
        raise _refusal(node, layer, "it applies dropout", "call model.eval() before exporting")
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = float(shape_of(query)[-1]) ** -0.5
    mask = argument(node, 3, "attn_mask")
    with program.graph.inserting_before(node):
        if argument(node, 5, "is_causal", False):
            mask = _causal_mask(program)
    bias = None
    if isinstance(mask, fx.Node) and mask.meta.get("val") is not None:
        mask, bias = split_mask(program, query, mask, node)
    with program.graph.inserting_before(node):
        site = program.graph.call_function(SITE_OP, (query, key, value, mask, None, bias, scale, None, None, layer))
    site.meta.update(node.meta)
    node.replace_all_uses_with(site)
    program.graph.erase_node(node)
    return site


def _from_softmax(program: Program, node: fx.Node, layer: int) -> fx.Node:
    """Replace attention that is written out by an `attention_site`."""
    try:
        return locate(program, node, layer)
    except NotAttention as reason:
        raise _refusal(node, layer, str(reason), _HINT) from reason


def _causal_mask(program: Program) -> fx.Node:
    """What `is_causal=True` means, as nodes: so that one proof serves every mask."""
    graph = program.graph
    tokens = graph.call_function(aten.sym_size.int, (program.input_ids, 1))
    options: dict[str, Any] = {"dtype": torch.bool, "device": program.device}
    ones = graph.call_function(aten.ones.default, ([tokens, tokens],), options)
    return graph.call_function(aten.tril.default, (ones,))


def _refuse_unknown(program: Program, node: fx.Node, layer: int) -> None:
    """Refuse what may be attention and is no site: nothing may be left unpruned without a word."""
    if node.op == "get_attr" and isinstance(region := attribute(program.module, str(node.target)), fx.GraphModule):
        for inner in _nodes(region):
            if may_be_attention(inner) or is_call(inner, SITE_OP, aten.scaled_dot_product_attention):
                user = next(iter(node.users))
                raise _refusal(inner, layer, f"attention inside the region of '{user.name}' ({user.target})", _HINT)
    elif may_be_attention(node):
        shape = ", ".join(map(str, shape_of(node)))
        raise _refusal(node, layer, f"{node.target} [{shape}] is attention in a form that is not recognised", _HINT)


def _nodes(region: fx.GraphModule) -> Iterator[fx.Node]:
    for module in region.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _check_count(program: Program, sites: list[Site]) -> None:
    if not sites:
        hint = "is it a decoder? attention must reach the graph as scaled_dot_product_attention or through transformers"
        raise UnsupportedGraphError("no attention was found in the graph", hint=hint)
    if program.expected_layers is not None and program.expected_layers != len(sites):
        found = ", ".join(dict.fromkeys(site.name for site in sites))
        raise UnsupportedGraphError(
            f"the model attends {program.expected_layers} times, {len(sites)} attentions were located: {found}"
        )


def _refusal(node: fx.Node, layer: int, reason: str, hint: str | None = None) -> UnsupportedGraphError:
    return UnsupportedGraphError(reason, layer=layer, node=node.name, where=source_of(node) or None, hint=hint)
