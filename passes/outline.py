"""Outline repeated layers: cut the graph at the ops that carry state, and name the spans between that are one region.

In a decoder of n layers the span from one attention to the next (output projection, MLP, norms, the next layer's
projections) is the same computation n - 1 times, with other weights. It writes nothing, so it can be compiled once, as
a function of its weights, and called n - 1 times; what the cached op writes stays outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from lethe_compile.passes.program import STATE_OPS, Program, is_call, is_symbolic, same_size, shape_of

_SIZES = (torch.SymInt, torch.SymBool, torch.SymFloat)


@dataclass(frozen=True)
class Span:
    """One piece of the graph between two ops that carry state: a region, and what it is called with.

    `inputs` are nodes of the program's graph, weights (`get_attr`) among them, in the order of the region's
    placeholders; `outputs` the nodes that it computes for others, in the order in which the region returns them.
    """

    region: int
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Outline:
    """Spans ``0 … n`` around the ops ``0 … n-1`` that carry state, and the distinct regions that they call."""

    spans: tuple[Span, ...]
    cuts: tuple[fx.Node, ...]
    regions: tuple[fx.GraphModule, ...]


def outline(program: Program) -> Outline:
    """Cut `program` at its cached attention ops, and at the calls of stateful modules.

    before => after::

        x0 = first(ids, w0); a0 = attention(x0 …); x1 = middle(a0, w1); a1 = attention(x1 …); y = last(a1, w2)
        spans [first, middle, …, last], where spans that differ in nothing but their weights share a region

    A node runs in the latest span that still serves all its users, so that views and constants of one layer stay in
    it. Sizes are recomputed in every span, from the shape of one of its inputs.
    """
    graph = program.graph
    cuts = tuple(n for n in graph.nodes if is_call(n, *STATE_OPS))
    stage = _stages(graph, cuts)
    spans: list[Span] = []
    regions: list[fx.GraphModule] = []
    known: dict[str, int] = {}
    for index in range(len(cuts) + 1):
        outputs = _outputs(graph, cuts, stage, index)
        body = _Body(program, stage, index)
        key, inputs, module = body.build(outputs)
        if key not in known:
            known[key] = len(regions)
            regions.append(module)
        spans.append(Span(known[key], inputs, outputs))
    return Outline(tuple(spans), cuts, tuple(regions))


def narrowed(program: Program, span: Span) -> list[tuple[fx.Node, int]] | None:
    """Which dimension of a span's inputs counts tokens, so that it can run on some of the tokens alone.

    None where tokens hide in a product of sizes.
    """
    rows, tokens = shape_of(program.input_ids)
    found = []
    for node in span.inputs:
        if node.op == "get_attr":
            continue
        dims = [dim for dim, size in enumerate(shape_of(node)) if same_size(size, tokens)]
        others = [s for s in shape_of(node) if not isinstance(s, int) and not same_size(s, tokens)]
        if len(dims) > 1 or any(not same_size(size, rows) for size in others):
            return None
        if dims:
            if not same_size(shape_of(node)[0], rows):
                return None
            found.append((node, dims[0]))
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), _SIZES)


def _stages(graph: fx.Graph, cuts: tuple[fx.Node, ...]) -> dict[fx.Node, int]:
    """The span in which each node runs: the first of its users', at least the first in which its operands exist.

    What is taken out of a list of tensors stays where the list is made: only tensors pass from span to span.
    """
    last = len(cuts)
    after = {node: index + 1 for index, node in enumerate(cuts)}
    stage: dict[fx.Node, int] = {}
    for node in graph.nodes:
        ready = max((stage[n] for n in node.all_input_nodes), default=0)
        stage[node] = after.get(node, ready)
    needed = {node: index for index, node in enumerate(cuts)}
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            stage[node] = last
        elif node.op == "call_function" and node not in after and node.users and not is_call(node, getitem):
            stage[node] = max(stage[node], min(needed.get(user, stage[user]) for user in node.users))
    return stage


def _outputs(graph: fx.Graph, cuts: tuple[fx.Node, ...], stage: dict[fx.Node, int], index: int) -> tuple[fx.Node, ...]:
    """What span `index` computes for the op after it, for later spans, or as the graph's result; operands first."""
    operands = cuts[index].all_input_nodes if index < len(cuts) else graph.output_node().all_input_nodes
    here = [n for n in graph.nodes if n.op == "call_function" and n not in cuts and stage[n] == index]
    outputs = dict.fromkeys(n for n in operands if n in here)
    later = set(cuts[index + 1 :])

    def serves_later(user: fx.Node) -> bool:
        if stage[user] > index or user in later:
            return True
        return _is_size(user) and not is_call(user, torch.ops.aten.sym_size) and any(map(serves_later, user.users))

    for node in here:  # a size that is read off data is read again in every span
        if not _is_size(node) and any(map(serves_later, node.users)):
            outputs.setdefault(node)
    return tuple(outputs)


class _Body:
    """Builds the region of one span, numbering its nodes from the outputs back, so that equal spans get equal keys."""

    def __init__(self, program: Program, stage: dict[fx.Node, int], index: int) -> None:
        self.program, self.stage, self.index = program, stage, index
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.inputs: list[fx.Node] = []
        self.key: list[str] = []

    def build(self, outputs: tuple[fx.Node, ...]) -> tuple[str, tuple[fx.Node, ...], fx.GraphModule]:
        order = [node for root in outputs for node in self._walk(root)]
        for node in order:
            if self._inside(node) is False:
                self._add_input(node)
        for node in order:
            self._copy(node)
        self.graph.output(tuple(self.copies[n] for n in outputs))
        self.key.append("-> " + " ".join(self.copies[n].name for n in outputs))
        return "\n".join(self.key), tuple(self.inputs), fx.GraphModule({}, self.graph)

    def _inside(self, node: fx.Node) -> bool | None:
        """True: computed here; False: comes in as a tensor; None: a size, computed wherever it is needed."""
        if _is_size(node):
            return None
        return node.op == "call_function" and self.stage[node] == self.index and not is_call(node, *STATE_OPS)

    def _walk(self, root: fx.Node) -> Iterator[fx.Node]:
        """Nodes that `root` needs here, operands first, each once over all roots."""
        stack = [(root, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                yield node
            elif node not in self.copies:
                self.copies[node] = node  # claimed; replaced by the copy
                stack.append((node, True))
                if self._inside(node) or (self._inside(node) is None and not self._reads_ids(node)):
                    stack.extend((n, False) for n in reversed(node.all_input_nodes))

    def _reads_ids(self, node: fx.Node) -> bool:
        """Whether a size is one of `input_ids`, which may be read off any tensor that has it."""
        return is_call(node, torch.ops.aten.sym_size)

    def _add_input(self, node: fx.Node) -> None:
        name = f"x{len(self.inputs)}"
        self.copies[node] = copy = self.graph.placeholder(name)
        copy.meta["val"] = value = node.meta["val"]
        self.inputs.append(node)
        weight = " weight" if node.op == "get_attr" else ""
        self.key.append(f"{name}: {value.dtype} {[str(s) for s in value.shape]}{weight}")

    def _copy(self, node: fx.Node) -> None:
        if self.copies[node] is not node:
            return
        if _is_size(node) and self._reads_ids(node):
            source, dim = self._with_size(node)
            copy = self.graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
        else:
            copy = self.graph.node_copy(node, lambda n: self.copies[n])
        copy.meta = {"val": node.meta.get("val")}
        copy.name = f"n{len(self.key)}"
        self.copies[node] = copy
        self.key.append(f"{copy.name} = {copy.target} {copy.args} {copy.kwargs}")

    def _with_size(self, node: fx.Node) -> tuple[fx.Node, int]:
        """An input of the region, and the dimension of it, that is as large as the size `node`."""
        for source in self.inputs:
            for dim, size in enumerate(shape_of(source)):
                if source.op != "get_attr" and is_symbolic(size) and same_size(size, node.meta["val"]):
                    return self.copies[source], dim
        operand: Any = node.args[0]
        if operand not in self.copies or self.copies[operand] is operand:
            self._add_input(operand)
        return self.copies[operand], int(node.args[1])  # type: ignore[arg-type]
