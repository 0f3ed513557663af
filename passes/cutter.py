"""Rewrites a program for one rank: which weights are cut is planned, what follows from cut values is found here.

Calls are taken in the order of the graph. One on cut values computes on the parts where that is right, and where it
mixes what different ranks hold, these are gathered before it: a collective is never left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor, fx

from lethe_compile.passes.base import Note, refuse
from lethe_compile.passes.check import fake_mode_of, shapes_alone
from lethe_compile.passes.parts import Parts, Share, collective
from lethe_compile.passes.placement import Placement, Samples, Uncuttable, Value, placement_after
from lethe_compile.passes.program import Program, is_call, is_symbolic, same_sizes
from lethe_compile.passes.reading import call
from lethe_compile.passes.split_plan import Plan, Product, product_of

aten = torch.ops.aten

_RESHAPES = (aten.reshape, aten.view, aten._unsafe_view, aten.expand)
_SPLITS = (aten.split, aten.split_with_sizes, aten.chunk)


class Cutter:
    """Cuts a program in the order of its graph: `placed` says how each rewritten value is held."""

    def __init__(self, options: Share, program: Program, plan: Plan) -> None:
        self._options, self._program, self._graph, self._plan = options, program, program.graph, plan
        self._rank, self._ranks = options.rank, options.ranks
        self._was = {node: node.meta.get("val") for node in self._graph.nodes}
        self._samples = Samples(program)
        self._parts = Parts(options, program)
        self._placed: dict[fx.Node, Value] = {}
        self._gathered: dict[fx.Node, fx.Node] = {}
        self._known: dict[Any, Value | Uncuttable] = {}
        self._unfit: Exception | None = None  # the last that `_compute` met
        self.sites = list(program.sites)
        self._site_of = {site.node: site.layer for site in self.sites}
        self.notes: list[Note] = []
        self.whole: list[tuple[str, int | None, str]] = [(node.name, layer, why) for node, layer, why in plan.whole]

    @property
    def split(self) -> set[str]:
        """Names of the weights of which something is cut."""
        return self._parts.split

    def run(self) -> None:
        for node in list(self._graph.nodes):
            if node.op == "output":
                self._whole_operands(node)
            elif node.op == "call_function":
                self._step(node)
        self._parts.fetch_whole()

    def _step(self, node: fx.Node) -> None:
        product = product_of(node)
        if node in self._site_of:
            self._attend(node)
        elif product is not None and node in self._plan.columns:
            self._by_columns(node, product, self._plan.columns[node])
        elif any(self._placed.get(n) is not None for n in node.all_input_nodes):
            held = None if product is None else self._placed.get(product.operand)
            if (
                product is not None
                and isinstance(held, Placement)
                and held.dim == len(self._shape(product.operand)) - 1
            ):
                self._by_rows(node, product, held)
            else:
                self._follow(node)

    def _shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Of a value before it was cut."""
        value = self._was.get(node, node.meta.get("val"))
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    # -------------------------------------------------------------------------------------------------------- products

    def _by_columns(self, node: fx.Node, product: Product, columns: Placement) -> None:
        self._whole_operands(node)
        weight = self._parts.weight(product, replace(columns, dim=product.columns))
        args = list(node.args)
        args[product.places[1]] = weight
        if product.bias is not None:
            args[cast("int", product.places[2])] = self._parts.part(product.bias, replace(columns, dim=0))
        if not self._commit(node, node.target, tuple(args), {}, columns):
            raise AssertionError(f"{node.name}: a product by columns has another shape") from self._unfit
        self.notes.append(Note(node.name, f"{product.weight.target} by columns", None))

    def _by_rows(self, node: fx.Node, product: Product, held: Placement) -> None:
        if not held.divides:  # what two ranks hold would count twice
            self._follow_whole(node)
            return
        weight = self._parts.weight(product, replace(held, dim=product.rows))
        operand = node.args[product.places[0]]
        others = [a for i, a in enumerate(node.args) if i not in (*product.places, None)]
        target = aten.mm.default if is_call(node, aten.addmm) else node.target
        node.target, node.args = target, (operand, weight, *others)
        users = list(node.users)
        with self._graph.inserting_after(node):
            partial = call(collective.all_reduce.default, (node, "sum", self._options.group), self._program)
        with self._graph.inserting_after(partial):
            total = call(collective.wait_tensor.default, (partial,), self._program)
        if product.bias is not None:
            with self._graph.inserting_after(total):
                total = call(aten.add.Tensor, (total, product.bias), self._program)
        for made in (partial, total):
            made.meta.update({k: v for k, v in node.meta.items() if k not in ("val", "lethe_operands")})
        for user in users:
            user.replace_input_with(node, total)
        self._was[total] = node.meta["val"]
        self.notes.append(Note(node.name, f"{product.weight.target} by rows, reduced", None))

    # ------------------------------------------------------------------------------------------------------- attention

    def _attend(self, node: fx.Node) -> None:
        layer = self._site_of[node]
        site, ranks = self.sites[layer], self._ranks
        parts = min(ranks, site.kv_heads)
        heads, kv_heads = (Placement.blocks(1, site.heads, ranks), Placement.blocks(1, site.kv_heads, ranks, parts))
        query, key, value, mask, sinks, bias, *rest = node.args
        if mask is not None or bias is not None:
            raise refuse("tensor parallelism: its mask or bias is an operand", self._program, layer)
        operands = [self._held(cast("fx.Node", query), heads)]
        operands += [self._held(cast("fx.Node", one), kv_heads) for one in (key, value)]
        if sinks is not None:
            sinks = self._held(cast("fx.Node", sinks), replace(heads, dim=0))
        if not self._commit(node, node.target, (*operands, None, sinks, None, *rest), {}, heads):
            raise AssertionError(f"{node.name}: attention over its share of heads has another shape") from self._unfit
        slopes = site.slopes and tuple(site.slopes[h] for h in heads.index[self._rank])
        local = replace(site, heads=heads.each, kv_heads=kv_heads.each, slopes=slopes, kv_parts=parts)
        self.sites[layer] = local
        self.notes.append(
            Note(node.name, f"{local.heads} of {site.heads} heads, {local.kv_heads} of {site.kv_heads} KV heads", layer)
        )

    def _held(self, node: fx.Node, wanted: Placement) -> fx.Node:
        """A value held as `wanted`: as it is, or cut out of the whole."""
        if wanted.each == wanted.size:
            return self._gather(node)
        held = self._placed.get(node)
        if isinstance(held, Placement) and held.key == wanted.key:
            return node
        return self._parts.part(self._gather(node), wanted)

    # -------------------------------------------------------------------------------------------------- what follows

    def _follow(self, node: fx.Node) -> None:
        """A call on cut values: on the same part of its other operands, or on the whole where it mixes ranks' parts."""
        try:
            held = self._after(node)
        except Uncuttable as reason:
            self.whole.append((node.name, None, f"what {node.target} takes is gathered: {reason}"))
            self._follow_whole(node)
            return
        if isinstance(held, tuple):
            done = self._follow_list(node, held)
        elif held is None:
            done = self._follow_common(node)
        else:
            target, args = self._localised(node, held)
            done = self._commit(node, target, args, dict(node.kwargs), held)
        if not done:
            self.whole.append((node.name, None, f"what {node.target} takes is gathered: its sizes are not understood"))
            self._follow_whole(node)

    def _after(self, node: fx.Node) -> Value:
        if node.target is getitem:
            held = self._placed[node.args[0]]  # type: ignore[index]
            assert isinstance(held, tuple)
            return held[cast("int", node.args[1])]
        shown = fx.node.map_arg((node.args, node.kwargs), self._signature)
        key = repr((node.target, shown))
        if key not in self._known:
            try:
                self._known[key] = placement_after(node, self._was_all, self._placed, self._samples, self._ranks)
            except Uncuttable as reason:
                self._known[key] = reason
        known = self._known[key]
        if isinstance(known, Uncuttable):
            raise known
        return known

    @property
    def _was_all(self) -> Mapping[fx.Node, Any]:
        return _Recorded(self._was)

    def _signature(self, node: fx.Node) -> Any:
        held = self._placed.get(node)
        keys = tuple(h and h.key for h in held) if isinstance(held, tuple) else held and held.key
        value = self._was.get(node, node.meta.get("val"))
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        return f"<{kind} {[str(s) for s in self._shape(node)]} {keys}>"

    def _localised(self, node: fx.Node, held: Placement) -> tuple[Any, tuple[Any, ...]]:
        """The call on a rank's part: sizes and bounds of the cut dimension, and the other operands' same part."""
        args = list(node.args)
        source = args[0] if args and isinstance(args[0], fx.Node) else None
        if is_call(node, *_RESHAPES):
            args[1] = _with_size(args[1], held.dim, held.each)
        elif is_call(node, aten.unflatten):
            first = cast("int", args[1]) % len(self._shape(cast("fx.Node", source)))
            if first <= held.dim < first + len(cast("Any", args[2])):
                args[2] = _with_size(args[2], held.dim - first, held.each)
        elif is_call(node, aten.slice):
            before = self._placed.get(source) if source is not None else None
            dim = cast("int", args[1]) % len(self._shape(cast("fx.Node", source))) if len(args) > 1 else 0
            if isinstance(before, Placement) and before.dim == dim == held.dim:
                args[1:] = [dim, *_bounds(before, self._rank, args[2:])]
        else:
            args = list(fx.node.map_arg(tuple(args), lambda n: self._aligned(n, node, held)))
        return node.target, tuple(args)

    def _aligned(self, operand: fx.Node, node: fx.Node, held: Placement) -> fx.Node:
        """The same part of an operand that every rank has whole, by the rules of broadcasting."""
        shape, behind = self._shape(operand), len(self._shape(node)) - held.dim
        if self._placed.get(operand) is not None or len(shape) < behind or is_symbolic(shape[-behind]):
            return operand
        if shape[-behind] != held.size or held.size == 1 or (is_call(node, aten.matmul, aten.bmm) and behind < 3):
            return operand
        return self._parts.part(operand, replace(held, dim=len(shape) - behind))

    def _follow_common(self, node: fx.Node) -> bool:
        """A call that picks from a cut value what every rank holds."""
        if node.target is getitem:
            return True
        source = node.args[0]
        before = self._placed.get(source) if isinstance(source, fx.Node) else None
        if not is_call(node, aten.slice) or not isinstance(before, Placement) or len(node.args) < 2:
            return False
        dim = cast("int", node.args[1]) % len(self._shape(cast("fx.Node", source)))
        if dim != before.dim:
            return False
        args = (source, dim, *_bounds(before, self._rank, list(node.args[2:])))
        return self._commit(node, node.target, args, {}, None)

    def _follow_list(self, node: fx.Node, held: tuple[Placement | None, ...]) -> bool:
        source = node.args[0]
        before = self._placed.get(source) if isinstance(source, fx.Node) else None
        if not is_call(node, *_SPLITS) or not isinstance(before, Placement):
            return False
        dim = cast("int", node.args[2] if len(node.args) > 2 else 0) % len(self._shape(cast("fx.Node", source)))
        if dim != before.dim:
            return self._commit_list(node, node.target, node.args, held)
        own, ends = before.index[self._rank], [0]
        for value in self._was[node]:
            ends.append(ends[-1] + int(value.shape[dim]))
        sizes = [sum(first <= i < end for i in own) for first, end in pairwise(ends)]
        return self._commit_list(node, aten.split_with_sizes.default, (source, sizes, dim), held)

    def _follow_whole(self, node: fx.Node) -> None:
        self._whole_operands(node)

    def _whole_operands(self, node: fx.Node) -> None:
        for operand in list(node.all_input_nodes):
            if self._placed.get(operand) is not None:
                node.replace_input_with(operand, self._gather(operand))

    # ------------------------------------------------------------------------------------------------------ rewriting

    def _commit(self, node: fx.Node, target: Any, args: Any, kwargs: Any, held: Placement | None) -> bool:
        """Make a node compute a rank's part, if that has the shape that it should have."""
        value = self._compute(target, args, kwargs)
        shape = list(self._shape(node))
        if held is not None:
            shape[held.dim] = held.each
        if not isinstance(value, Tensor) or not same_sizes(tuple(value.shape), shape):
            return False
        self._rewrite(node, target, args, value)
        self._placed[node] = held
        return True

    def _commit_list(self, node: fx.Node, target: Any, args: Any, held: tuple[Placement | None, ...]) -> bool:
        values = self._compute(target, args, dict(node.kwargs))
        if not isinstance(values, (list, tuple)) or len(values) != len(held):
            return False
        for value, was, one in zip(values, self._was[node], held, strict=True):
            shape = list(was.shape)
            if one is not None:
                shape[one.dim] = one.each
            if not same_sizes(tuple(value.shape), shape):
                return False
        self._rewrite(node, target, args, values)
        self._placed[node] = held
        return True

    def _compute(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        try:
            with shapes_alone(fake_mode_of(self._program)):
                return target(*given[0], **given[1])
        except Exception as error:  # sizes that do not fit: operators raise as they please; the whole value is gathered
            self._unfit = error
            return None

    @staticmethod
    def _rewrite(node: fx.Node, target: Any, args: Any, value: Any) -> None:
        node.target, node.args = target, args
        node.meta["val"] = value
        node.meta.pop("lethe_operands", None)

    def _gather(self, node: fx.Node) -> fx.Node:
        """The whole of a value that ranks hold in parts."""
        held = self._placed.get(node)
        if held is None:
            return node
        assert isinstance(held, Placement), "lists are taken apart first"
        if node not in self._gathered:
            self._gathered[node] = self._parts.all_gather(node, held)
        return self._gathered[node]


class _Recorded(Mapping[fx.Node, Any]):
    """Values as they were before anything was cut; of new nodes, as they are."""

    def __init__(self, was: Mapping[fx.Node, Any]) -> None:
        self._was = was

    def __getitem__(self, node: fx.Node) -> Any:
        return self._was[node] if node in self._was else node.meta["val"]

    def __iter__(self) -> Any:
        return iter(self._was)

    def __len__(self) -> int:
        return len(self._was)


def _with_size(sizes: Any, dim: int, size: int) -> list[Any]:
    new = list(sizes)
    if isinstance(new[dim], int) and new[dim] != -1:
        new[dim] = size
    return new


def _bounds(before: Placement, rank: int, given: list[Any]) -> list[int]:
    """(first, end, step) of a slice among what a rank holds, of the slice (first, end, step) of all."""
    first, end, step = (list(given) + [None] * 3)[:3]
    wanted = set(range(before.size)[slice(first, end, step)])
    found = [place for place, i in enumerate(before.index[rank]) if i in wanted]
    steps = {b - a for a, b in pairwise(found)} or {1}
    if not found or len(steps) > 1:
        return [0, 0, 1]  # no slice: its shape tells
    return [found[0], found[-1] + 1, steps.pop()]
