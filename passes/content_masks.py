"""Content masks: a mask computed from the tokens themselves goes on as an operand, over positions instead of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from lethe_compile.passes.axes import KEYS, QUERIES, Signature, operands_of, token_dims
from lethe_compile.passes.base import Note, PassResult, refuse
from lethe_compile.passes.check import fake_mode_of
from lethe_compile.passes.mask_constants import NotABand
from lethe_compile.passes.program import (
    BIAS,
    COLUMNS_SITE_OP,
    VISIBLE_SITE_OP,
    Mask,
    Program,
    Site,
    is_call,
    is_symbolic,
    remove_dead,
    same_size,
    shape_of,
    with_cache_groups,
)
from lethe_compile.passes.relations import Relations, counts, denies, sampled
from lethe_compile.passes.rewrite_positions import start_of

aten = torch.ops.aten

# Calls that only arrange what a token has: cached is what they arrange.
_LAYOUT = (aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze, aten.to, aten.contiguous, aten.slice)
_EXAMPLE = 23  # positions of the input `seen` that the graph is checked with


@dataclass(frozen=True)
class ContentMasks:
    """Keep masks and biases that depend on the content of the sequence as operands, over the positions seen so far.

    ``attention_site(q, k, v, mask [B, h, T, T], …)``  =>  ``attention_site(q, k, v, None, …, bias [B, h, T, P])``

    The sub-graph that relates tokens to tokens is made anew, for the new tokens as queries, T, and all positions as
    keys, P, which the new input ``seen [P]`` counts. What it takes of each token as a key is cached beside the keys,
    ``columns_site(x [B, T, n], seen) -> [B, P, n]``, and lost with the token; masks within it that depend on positions
    alone are proved to be causal bands, and become ``visible_site(…) -> [B, T, P]``, where what was evicted is hidden
    as later tokens are. So whatever ranks keys ranks those that the layer retains.

    Conditions: the sub-graph reads queries as one and keys as the other of its dimensions, see `passes.axes`; it hides
    keys by at least one band; what is cached is no wider a type than the keys.
    """

    name: ClassVar[str] = "content-masks"

    def run(self, program: Program) -> PassResult:
        relations = Relations(program)
        affected = [s for s in program.sites if not relations.content.isdisjoint(_operands(s))]
        if not affected:
            return PassResult(program)
        seen, made = _add_seen(program), dict[_Key, fx.Node]()
        sites, notes = list(program.sites), []
        for site in affected:
            try:
                sites[site.layer] = done = _Rewriter(program, site, seen, relations, made).rewrite()
            except NotABand as reason:
                raise refuse(str(reason), program, site.layer) from reason
            cached = f"{done.columns} numbers cached beside each key" if done.columns else "nothing cached"
            notes.append(Note(site.node.name, f"its mask reads the content: kept as an operand, {cached}", site.layer))
        remove_dead(program.graph)
        program.module.recompile()
        return PassResult(replace(program, sites=with_cache_groups(sites)), tuple(notes))


def _operands(site: Site) -> list[fx.Node]:
    """The site's mask and bias, those that it has."""
    return [n for n in (site.node.args[3], site.node.args[BIAS]) if isinstance(n, fx.Node)]


def _add_seen(program: Program) -> fx.Node:
    """The new input ``seen [P]`` int64: 0 … P-1, beyond the position of every token."""
    with program.graph.inserting_after(program.placeholders()[-1]):
        node = program.graph.placeholder("seen")
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    example = torch.empty(_EXAMPLE, dtype=torch.int64, device=program.device)
    node.meta["val"] = fake_mode_of(program).from_tensor(example, symbolic_context=context)
    return node


_Key = tuple[fx.Node, Signature, "int | None"]  # a node, which reading of it, and the layer that it was made for


class _Rewriter:
    """Makes the bias of one site anew."""

    def __init__(
        self, program: Program, site: Site, seen: fx.Node, relations: Relations, made: dict[_Key, fx.Node]
    ) -> None:
        self._program, self._site, self._seen, self._made = program, site, seen, made
        self._graph, self._relations, self._axes = program.graph, relations, relations.axes
        self._bands: dict[tuple[fx.Node, int], fx.Node] = {}
        self._width = 0  # numbers cached for this layer so far

    def rewrite(self) -> Site:
        node, bands = self._site.node, self._relations.bands_in(_operands(self._site))
        with self._graph.inserting_before(node):
            terms = [self._operand(n) for n in _operands(self._site)]
            bias = terms[0] if len(terms) == 1 else self._graph.call_function(aten.add.Tensor, tuple(terms))
            tokens = self._graph.call_function(aten.sym_size.int, (self._program.input_ids, 1))
            bias = self._graph.call_function(aten.expand.default, (bias, [-1, -1, tokens, -1]))
        node.update_arg(3, None)
        node.update_arg(BIAS, bias)
        if not bands:
            raise NotABand("its mask depends on the content of the sequence, and nothing in it hides later tokens")
        mask = bands.pop() if len(bands) == 1 else Mask(evidence="each band in it was evaluated element by element")
        columns = -(-self._width // self._site.kv_heads)
        return replace(self._site, mask=mask, content=True, columns=columns)

    def _operand(self, operand: fx.Node) -> fx.Node:
        """A mask or bias ``[B, h, T | 1, T]`` as what is added to scores, ``[B, h, T | 1, P]``."""
        if self._relations.band(operand) is not None:
            return self._added(operand, self._visible(operand, 4))
        wanted = ((QUERIES, KEYS), (1, KEYS))
        readings = [s for s in self._axes.readings(operand) if len(s) == 4 and s[2:] in wanted]
        if not readings:
            unread = self._axes.unread(operand).name
            raise NotABand(f"its mask depends on the content, by '{unread}', which does not tell queries from keys")
        return self._added(operand, self._make(operand, readings[0], 4))

    def _added(self, operand: fx.Node, node: fx.Node) -> fx.Node:
        if operand.meta["val"].dtype != torch.bool:
            return node
        zero = self._graph.call_function(aten.zeros.default, ([],), {"device": self._program.device})
        return self._graph.call_function(aten.where.ScalarOther, (node, zero, -torch.inf))

    def _make(self, node: fx.Node, signature: Signature, rank: int) -> fx.Node:
        """The node that computes that reading, for one of that rank.

        What was made for an earlier layer serves where that layer's keys were ranked or hidden: layers share a choice.
        """
        if node in self._relations.relating and self._relations.band(node) is not None:
            return self._visible(node, max(3, rank, len(signature)))
        if not self._axes.counts_keys(node, signature):
            return node
        key = (node, signature, None if self._relations.bands_in([node]) else self._site.layer)
        if key not in self._made:
            self._made[key] = self._of_keys(node) if self._relations.is_leaf(node) else self._again(node, signature)
        return self._made[key]

    def _again(self, node: fx.Node, signature: Signature) -> fx.Node:
        operands = self._axes.readings(node)[signature].operands
        rank = len(shape_of(node))
        new = iter([self._make(n, s, rank) for n, s in zip(operands_of(node), operands, strict=True)])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: next(new))
        made = self._graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        made.meta.update({key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta})
        return made

    def _of_keys(self, node: fx.Node) -> fx.Node:
        """What a value that is taken as it is becomes where it is one of each key."""
        if is_call(node, aten.sym_size):
            return self._graph.call_function(aten.sym_size.int, (self._seen, 0))
        if node is self._program.placeholder("position_ids"):
            rows = self._graph.call_function(aten.sym_size.int, (self._program.input_ids, 0))
            return self._graph.call_function(aten.expand.default, (self._seen, [rows, -1]))
        if counts(node, self._program):
            counted = self._graph.call_function(aten.add.Tensor, (self._seen, start_of(node)))
            return self._graph.call_function(aten.to.dtype, (counted, node.meta["val"].dtype))
        if node in self._relations.content:
            return self._cached(node)
        raise NotABand(f"its mask takes '{node.name}' of earlier tokens, which is not understood")

    def _cached(self, node: fx.Node) -> fx.Node:
        """A value of each token ``[B, …, T, …]`` as one of each position, ``[B, …, P, …]``."""
        chain: list[fx.Node] = []
        while self._arranges(node):
            chain.append(node)
            node = node.args[0]  # type: ignore[assignment]
        shape, dim = shape_of(node), token_dims(node, self._program)[0]
        rest = [d for d in range(1, len(shape)) if d != dim]
        self._check_cached(node, [shape[d] for d in rest])
        sizes = [shape[d] for d in rest]
        rows, tokens = (self._graph.call_function(aten.sym_size.int, (self._program.input_ids, d)) for d in (0, 1))
        count = self._graph.call_function(aten.sym_size.int, (self._seen, 0))
        width = torch.Size(sizes).numel()
        order = [0, dim, *rest]
        flat = self._graph.call_function(aten.permute.default, (node, order))
        flat = self._graph.call_function(aten.reshape.default, (flat, [rows, tokens, width]))
        offset, self._width = self._width, self._width + width
        options = (self._site.layer, offset)
        value = self._graph.call_function(COLUMNS_SITE_OP, (flat, self._seen, *options))
        value = self._graph.call_function(aten.reshape.default, (value, [rows, count, *sizes]))
        value = self._graph.call_function(aten.permute.default, (value, [order.index(d) for d in range(len(order))]))
        for arranging in reversed(chain):
            value = self._graph.call_function(arranging.target, (value, *arranging.args[1:]), dict(arranging.kwargs))  # type: ignore[arg-type]
        return value

    def _arranges(self, node: fx.Node) -> bool:
        """Whether `node` does no more than arrange its operand, which is a value of each token as well."""
        if not is_call(node, *_LAYOUT) or len(node.all_input_nodes) != 1:
            return False
        if is_call(node, aten.slice) and not all(map(same_size, shape_of(node), shape_of(node.args[0]))):
            return False
        source = node.all_input_nodes[0]
        return len(token_dims(source, self._program)) == 1 and same_size(shape_of(source)[0], self._rows)

    @property
    def _rows(self) -> Any:
        return shape_of(self._program.input_ids)[0]

    def _check_cached(self, node: fx.Node, sizes: Iterable[Any]) -> None:
        keys, kind = self._site.node.args[1].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
        shape = ", ".join(map(str, shape_of(node)))
        if not same_size(shape_of(node)[0], self._rows) or any(map(is_symbolic, sizes)):
            raise NotABand(f"its mask takes '{node.name}' [{shape}] of earlier tokens, which is not one value a token")
        if not (kind.is_floating_point or kind == torch.bool) or torch.promote_types(kind, keys) != keys:
            raise NotABand(f"its mask takes '{node.name}' of earlier tokens, {kind}, which cannot be kept as {keys}")

    def _visible(self, node: fx.Node, rank: int) -> fx.Node:
        """What the band computed at `node` becomes: what is visible of the tokens that this layer retains.

        It differs from row to row, as the band may not do: `rank` is that of what it meets, ``[B, 1 …, T, P]``.
        """
        band = self._relations.band(node)
        assert band is not None
        if (node, rank) in self._bands:
            return self._bands[node, rank]
        options = (band.window, band.chunked, self._site.layer)
        value = self._graph.call_function(VISIBLE_SITE_OP, (self._program.input_ids, self._seen, *options))
        for _ in range(rank - 3):
            value = self._graph.call_function(aten.unsqueeze.default, (value, 1))
        kind = node.meta["val"].dtype
        if kind != torch.bool:
            zero = self._graph.call_function(aten.zeros.default, ([],), {"dtype": kind, "device": self._program.device})
            denying = float(sampled(self._program, node).min())
            value = self._graph.call_function(aten.where.ScalarOther, (value, zero, denying))
        elif denies(self._program, node):
            value = self._graph.call_function(aten.logical_not.default, (value,))
        self._bands[node, rank] = value
        return value
