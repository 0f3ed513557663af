"""Which weights tensor parallelism splits: found on the graph by walking back from attention and from products.

A product whose value reaches the heads of one rank alone is split by columns; the one that takes them up again, by
rows. Which of its columns reach which heads is not read from names or layouts: gradients on a sample tell, so that
fused and interleaved projections, gates and rotary embeddings need no rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.placement import Placement, Samples, Uncuttable, Value, placement_after, walks
from lethe_compile.passes.program import SITE_OP, Program, Site, is_call, is_symbolic, module_path, shape_of

aten = torch.ops.aten

_LONGEST, _MOST_SOURCES = 240, 16  # calls between two products, and products behind one value
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
_NARROW = 8  # a product of fewer numbers than an eighth of its result, as of an adapter, costs more than it saves


@dataclass(frozen=True)
class Product:
    """``operand @ weight (+ bias)`` over the last dimension; `columns`, `rows`: dimensions of the weight as stored."""

    operand: fx.Node
    weight: fx.Node  # get_attr
    turned: bool  # its last two dimensions are swapped on the way
    columns: int
    rows: int
    bias: fx.Node | None
    places: tuple[int, int, int | None]  # of operand, weight and bias among the call's arguments


def product_of(node: Any) -> Product | None:
    """A call as the product with a weight of the model; None if it is none."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.kwargs:
        return None
    name = node.target.name().partition(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""
    if is_call(node, aten.linear):
        return _product(node, 0, 1, 2, by_rows=True)
    if is_call(node, aten.addmm):
        return _product(node, 1, 2, 0)
    if is_call(node, aten.mm, aten.matmul, aten.bmm) or (name in _GROUPED and len(node.args) == 3):
        return _product(node, 0, 1, None)
    return None


def _product(node: fx.Node, operand: int, weight: int, bias: int | None, by_rows: bool = False) -> Product | None:
    source, raw = node.args[operand], node.args[weight]
    added = node.args[bias] if bias is not None and len(node.args) > bias else None
    turned = is_call(raw, aten.transpose, aten.t, aten.numpy_T) and _swaps_last(raw)
    if turned:
        raw = raw.args[0]  # type: ignore[union-attr]
    if not isinstance(source, fx.Node) or not isinstance(raw, fx.Node) or raw.op != "get_attr":
        return None
    if added is not None and (not isinstance(added, fx.Node) or added.op != "get_attr" or len(shape_of(added)) != 1):
        return None
    rank = len(shape_of(raw))
    if rank < 2:
        return None
    columns, rows = (rank - 2, rank - 1) if by_rows != turned else (rank - 1, rank - 2)
    return Product(source, raw, bool(turned), columns, rows, added, (operand, weight, bias))


def _swaps_last(node: Any) -> bool:
    rank = len(shape_of(node))
    dims = [d % rank for d in node.args[1:3]] if is_call(node, aten.transpose) else [0, 1]
    return sorted(dims) == [rank - 2, rank - 1]


def style_of(weight: str, styles: Mapping[str, str]) -> str:
    """What a plan of module patterns, such as transformers' `tp_plan`, has for a weight; "" if nothing."""
    patterns = (name for name in styles if fnmatch(weight, f"*{name}") or fnmatch(weight, f"*{name}.weight"))
    return next((styles[name] for name in patterns), "")


@dataclass
class Plan:
    """`columns`: how the values of products are held that are split by columns; what is held whole, and why."""

    columns: dict[fx.Node, Placement] = field(default_factory=dict)
    whole: list[tuple[fx.Node, int | None, str]] = field(default_factory=list)


class Planner:
    """Makes the plan for a program that is as it was captured, for so many ranks.

    `styles` are the model's own plan. It decides one thing that the graph leaves open: what all ranks need whole, as a
    projection that is normalised over all its heads, is split by columns and gathered where it says "colwise".
    """

    def __init__(self, program: Program, ranks: int, styles: Mapping[str, str]) -> None:
        self._program, self._ranks, self._styles = program, ranks, styles
        self._samples = Samples(program)
        self._whole = {node: node.meta.get("val") for node in program.graph.nodes}
        self._generator = torch.Generator().manual_seed(1)
        self._order = {node: index for index, node in enumerate(program.graph.nodes)}
        self.plan = Plan()
        self._sinks: set[fx.Node] = set()

    def run(self) -> Plan:
        for site in self._program.sites:
            self._split_attention(site)
        for node in list(self._program.graph.nodes):
            product = product_of(node)
            if product is not None and node not in self.plan.columns and product.operand not in self._sinks:
                self._sinks.add(product.operand)
                self._split_pair(product.operand, int(shape_of(product.weight)[product.columns]))
        self._split_head()
        return self.plan

    # -------------------------------------------------------------------------------------------------- what is split

    def _split_attention(self, site: Site) -> None:
        blocks = Placement.blocks(1, site.heads, self._ranks)
        sink, seed = self._taken_up(site.node, blocks)
        found = self._columns(sink, seed)
        self._sinks.add(sink)
        if isinstance(found, str):
            self.plan.whole.append((site.node, site.layer, f"its projections stay whole: {found}"))
            return
        for source, columns in found.items():
            if isinstance(columns, Placement):
                self.plan.columns.setdefault(source, columns)
            elif columns:
                self.plan.whole.append((source, site.layer, columns))

    def _taken_up(self, node: fx.Node, placement: Placement) -> tuple[fx.Node, Placement]:
        """What a product takes up of a cut value, and how that is held; the value itself where none is found."""
        placed: dict[fx.Node, Value] = {node: placement}
        frontier = sorted(node.users, key=self._order.__getitem__)
        for _ in range(_LONGEST):
            if not frontier:
                break
            current = frontier.pop(0)
            product = product_of(current)
            held = None if product is None else placed.get(product.operand)
            if product is not None and isinstance(held, Placement) and held.dim == len(shape_of(product.operand)) - 1:
                return product.operand, held
            if all(placed.get(n) is None for n in current.all_input_nodes):
                continue
            try:
                placed[current] = placement_after(current, self._whole, placed, self._samples, self._ranks)
            except Uncuttable:
                break
            frontier = sorted({*frontier, *current.users}, key=self._order.__getitem__)
        return node, placement

    def _split_pair(self, sink: fx.Node, width: int) -> None:
        """Products behind `sink`, as of an MLP, where what a product takes up can be cut in equal blocks."""
        shape = shape_of(sink)
        if not shape or is_symbolic(shape[-1]) or shape[-1] % self._ranks or shape[-1] * _NARROW < width:
            return
        found = self._columns(sink, Placement.blocks(len(shape) - 1, int(shape[-1]), self._ranks))
        if isinstance(found, str):
            return
        split = {source: columns for source, columns in found.items() if isinstance(columns, Placement)}
        inside = set(self._behind(sink)[0]) | {sink}
        if not split or any(not columns.divides for columns in split.values()):
            return
        if any(user not in inside and user is not sink for source in split for user in source.users if source != sink):
            return
        if all(self.plan.columns.get(source, columns) == columns for source, columns in split.items()):
            self.plan.columns.update(split)

    def _split_head(self) -> None:
        """The product that the logits come from, by blocks of the vocabulary."""
        logits = self._program.graph.output_node().args[0]
        assert isinstance(logits, fx.Node)
        _, sources = self._behind(logits)
        if product_of(logits) is not None:
            sources = [logits]
        for source in sources:
            size = shape_of(source)[-1]
            if len(sources) > 1 or source in self.plan.columns:
                return
            self.plan.columns[source] = Placement.covering(len(shape_of(source)) - 1, int(size), self._ranks)

    # ------------------------------------------------------------------------------------------------------- gradients

    def _columns(self, sink: fx.Node, seed: Placement) -> Mapping[fx.Node, Placement | str] | str:
        """For each product behind `sink`, how its value is held where `sink` is held as `seed`, or why it is not.

        A string where none can be told: why. The text is empty for a product that has nothing to do with the cut.
        """
        nodes, sources = self._behind(sink)
        if not sources:
            return "no product with a weight is near"
        if len(nodes) > _LONGEST or len(sources) > _MOST_SOURCES:
            return "more lies between its products than is looked through"
        try:
            value, leaves = self._value(sink, nodes, sources)
            cut = [self._reached(value, seed, rank, leaves) for rank in range(self._ranks)]
        except Uncuttable as reason:
            return str(reason)
        return {source: self._as_placement(source, [reached[i] for reached in cut]) for i, source in enumerate(sources)}

    def _as_placement(self, source: fx.Node, reached: list[tuple[int, ...]]) -> Placement | str:
        rank, size = len(shape_of(source)), int(shape_of(source)[-1])
        sets = set(reached)
        if sets == {()}:
            return ""
        if len(sets) == 1 and len(reached[0]) == size and size % self._ranks == 0:
            product = product_of(source)
            if product is not None and style_of(str(product.weight.target), self._styles).startswith("colwise"):
                return Placement.blocks(rank - 1, size, self._ranks)  # gathered by the call that mixes it
        if len(sets) == 1:
            return "" if len(reached[0]) < size else f"'{_name(source)}' stays whole: every rank's heads need all of it"
        if len({len(own) for own in reached}) > 1 or len({i for own in sets for i in own}) < size:
            return f"'{_name(source)}' stays whole: ranks need unequal numbers of its columns, or none some of them"
        return Placement(rank - 1, size, tuple(reached))

    def _behind(self, sink: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The calls between products and `sink`, in order, and those products."""
        seen: set[fx.Node] = set()
        sources: set[fx.Node] = set()
        stack = [sink]
        while stack and len(seen) <= _LONGEST and len(sources) <= _MOST_SOURCES:
            node = stack.pop()
            if node in seen or node in sources:
                continue
            if product_of(node) is not None:
                sources.add(node)
            elif walks(node) and not (node.target is getitem and not walks(node.args[0])):  # type: ignore[arg-type]
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return sorted(seen, key=self._order.__getitem__), sorted(sources, key=self._order.__getitem__)

    def _value(self, sink: fx.Node, nodes: list[fx.Node], sources: list[fx.Node]) -> tuple[Tensor, list[Tensor]]:
        leaves = [self._samples.of(self._whole[source]).requires_grad_() for source in sources]
        values: dict[fx.Node, Any] = dict(zip(sources, leaves, strict=True))
        if sink in values:
            return values[sink], leaves

        def given(node: fx.Node) -> Any:
            if node not in values:
                values[node] = self._samples.of(self._whole[node])
            return values[node]

        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
            kwargs = {name: torch.device("cpu") if isinstance(v, torch.device) else v for name, v in kwargs.items()}
            try:
                with torch.enable_grad():
                    call: Any = _stand_in if is_call(node, SITE_OP) else node.target
                    values[node] = call(*args, **kwargs)
            except Exception as error:  # operators raise as they please; nothing is split then
                raise Uncuttable(f"'{node.name}' does not run on a sample: {error}") from error
        return values[sink], leaves

    def _reached(self, value: Tensor, seed: Placement, rank: int, leaves: list[Tensor]) -> list[tuple[int, ...]]:
        """The entries of the last dimension of each leaf that a rank's part of `value` depends on."""
        part = seed.cut(value, rank)
        weight = torch.rand(part.shape, generator=self._generator).add_(0.5)  # a plain sum may cancel what matters
        if not part.requires_grad:
            return [()] * len(leaves)
        grads = torch.autograd.grad((part.float() * weight).sum(), leaves, retain_graph=True, allow_unused=True)
        return [
            () if grad is None else tuple(grad.float().abs().flatten(0, -2).sum(0).nonzero()[:, 0].tolist())
            for grad in grads
        ]


def _stand_in(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Depends on what attention depends on, head by head."""
    group = query.shape[1] // key.shape[1]
    seen = (key.sum((2, 3)) + value.sum((2, 3))).repeat_interleave(group, 1)[:, :, None, None]
    own = query.sum(-1, keepdim=True) + seen
    return own.expand(*own.shape[:3], value.shape[3])


def _name(node: fx.Node) -> str:
    product = product_of(node)
    return module_path(node) or (str(product.weight.target) if product is not None else node.name)
