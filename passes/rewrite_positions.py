"""Rewrite positions: whatever the graph takes for the position of a token becomes the input `positions`.

After eviction a slot's index is not its token's position, and the rows of a batch stand at different positions. A graph
that counts its own tokens (`arange(T)`, or the first T rows of a table) is right only for a whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.program import (
    SITE_OP,
    Program,
    ancestors,
    attribute,
    is_call,
    remove_dead,
    same_size,
    shape_of,
    source_of,
)

aten = torch.ops.aten

_ELEMENTWISE = (aten.add, aten.sub, aten.mul, aten.div, aten.where, aten.addcmul, aten.complex)


@dataclass(frozen=True)
class RewritePositions:
    """Make token positions an input.

    ============================================================  =====================================================
    before                                                        after
    ============================================================  =====================================================
    input `position_ids`                                          input `positions`
    ``arange(T)``, ``arange(T) + c``, ``arange(c, T + c)``        ``positions[row]`` (+ c), computed for every row
    ``table[:T]``, the first rows of a constant                   ``table[positions[row]]``
    ============================================================  =====================================================

    A graph that counts its tokens once computes with ``[T]`` or ``[1, T]`` what rows now need for themselves: the
    sub-graph that depends on the count alone is mapped over rows with `torch.vmap`, and its results meet the rest of the
    graph with a batch dimension in front. Condition: they meet it in an elementwise operator, which broadcasts.
    """

    name: ClassVar[str] = "rewrite-positions"

    def run(self, program: Program) -> PassResult:
        notes = []
        given = program.placeholder("position_ids")
        if given is not None:
            given.target = given.name = "positions"
            notes.append(Note("positions", "input position_ids"))
        else:
            _add_positions(program)
        counters = [n for n in program.graph.nodes if _counts_tokens(n, program)]
        if counters:
            _map_over_rows(program, counters)
            notes += [Note(n.name, "counted the tokens of the input: now per row") for n in counters]
        remove_dead(program.graph)
        program.module.recompile()
        return PassResult(program, tuple(notes))


def _add_positions(program: Program) -> None:
    ids = program.input_ids
    with program.graph.inserting_after(program.placeholders()[-1]):
        node = program.graph.placeholder("positions")
    node.meta["val"] = torch.empty_like(ids.meta["val"], dtype=torch.int64)


def _counts_tokens(node: fx.Node, program: Program) -> bool:
    """Whether `node` is ``arange(start, start + T)`` or the first T rows of a constant."""
    shape = shape_of(node)
    tokens = shape_of(program.input_ids)[1]
    if is_call(node, aten.arange):
        return len(shape) == 1 and same_size(shape[0], tokens)
    if is_call(node, aten.slice) and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
        return node.args[1] == 0 and node.args[2] in (0, None) and bool(shape) and same_size(shape[0], tokens)
    return False


def _map_over_rows(program: Program, counters: list[fx.Node]) -> None:
    """Replace the sub-graph that depends on the token count alone by one that depends on `positions`."""
    inside = _depends_on_count(program, counters)
    frontier = [n for n in inside if any(user not in inside for user in n.users)]
    for node in frontier:
        _check_consumers(node, inside)
    constants = [n for n in program.graph.nodes if n.op == "get_attr" and any(u in inside for u in n.users)]
    region = _trace_region(program, counters, inside, frontier, constants)
    anchor = min(inside, key=list(program.graph.nodes).index)
    positions = program.placeholder("positions")
    outputs = _inline(program, region, anchor, [positions, *constants])
    for node, output in zip(frontier, outputs, strict=True):
        for user in [u for u in node.users if u not in inside]:
            with program.graph.inserting_before(user):
                aligned = _align(program.graph, output, node, user)
            user.replace_input_with(node, aligned)


def _depends_on_count(program: Program, counters: list[fx.Node]) -> dict[fx.Node, None]:
    """Nodes computed from the counters, constants and sizes alone, in graph order."""
    fixed = {n for n in program.graph.nodes if n.op == "get_attr" or is_call(n, aten.sym_size)}
    inside: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if node in counters:
            inside[node] = None
        elif node.op == "call_function" and not is_call(node, SITE_OP):
            operands = node.all_input_nodes
            if any(n in inside for n in operands) and all(n in inside or n in fixed or _is_size(n) for n in operands):
                inside[node] = None
    return inside


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _check_consumers(node: fx.Node, inside: dict[fx.Node, None]) -> None:
    for user in node.users:
        if user in inside or is_call(user, *_ELEMENTWISE):
            continue
        raise UnsupportedGraphError(
            f"token positions computed at '{node.name}' enter '{user.name}' ({user.target}), which does not broadcast",
            node=user.name,
            where=source_of(user) or None,
            hint="give the model a position_ids input of shape [batch, tokens]",
        )


def _trace_region(
    program: Program,
    counters: list[fx.Node],
    inside: dict[fx.Node, None],
    frontier: list[fx.Node],
    constants: list[fx.Node],
) -> fx.GraphModule:
    """The region as a graph of its own, ``(positions [B, T], *constants) -> frontier values [B, …]``."""
    graph = fx.Graph()
    row = graph.placeholder("row")
    values: dict[fx.Node, Any] = {c: graph.placeholder(f"constant_{i}") for i, c in enumerate(constants)}
    tokens = graph.call_method("size", (row, 0))  # vmap has no rule for aten.sym_size
    batch, length = shape_of(program.input_ids)
    wanted = {a for n in inside for a in ancestors(n)}
    for node in program.graph.nodes:
        if node in counters:
            values[node] = _counted(graph, node, row, values)
        elif node in inside or (node in wanted and _is_size(node)):
            size = node.meta.get("val")
            if _is_size(node) and same_size(size, batch):
                values[node] = 1  # inside the map a row is a batch of one
            elif _is_size(node) and same_size(size, length):
                values[node] = tokens
            else:
                values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[n] for n in frontier))
    region = fx.GraphModule(nn.Module(), graph)
    examples = [attribute(program.module, str(c.target)) for c in constants]
    return make_fx(_per_row(region), tracing_mode="symbolic")(torch.zeros(2, 9, dtype=torch.int64), *examples)


def _per_row(region: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """Map a region ``f(positions [T], *constants)`` over the rows of ``positions [B, T]``."""

    def mapped(positions: Tensor, *constants: Tensor) -> tuple[Tensor, ...]:
        return torch.vmap(lambda row: region(row, *constants))(positions)  # type: ignore[no-any-return]

    return mapped


def _counted(graph: fx.Graph, node: fx.Node, row: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """What a counter becomes for one row of positions."""
    if is_call(node, aten.slice):
        return graph.call_function(aten.index_select.default, (values[node.args[0]], 0, row))  # type: ignore[index]
    start = node.args[0] if is_call(node, aten.arange.start, aten.arange.start_step) else 0
    counted = graph.call_function(aten.add.Tensor, (row, start)) if start else row
    dtype = node.meta["val"].dtype
    return counted if dtype == torch.int64 else graph.call_function(aten.to.dtype, (counted, dtype))


def _inline(program: Program, region: fx.GraphModule, before: fx.Node, inputs: list[Any]) -> list[fx.Node]:
    """Copy a traced region into the graph; its outputs as nodes there."""
    own = [n for n in region.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(own, inputs, strict=True))
    skipped = (aten._assert_tensor_metadata, aten._assert_scalar)
    with program.graph.inserting_before(before):
        for node in region.graph.nodes:
            if node.op == "output":
                outputs = fx.node.map_arg(node.args[0], lambda n: values[n])
                return list(outputs)
            if node.op == "get_attr":
                name = f"positions_constant_{len(values)}"
                setattr(program.module, name, attribute(region, str(node.target)))
                values[node] = program.graph.get_attr(name)
            elif node.op == "call_function" and not is_call(node, *skipped):
                values[node] = program.graph.node_copy(node, lambda n: values[n])
                values[node].meta.pop("val", None)  # it has the region's symbols: computed anew in the graph's
    raise AssertionError("an FX graph ends in an output")


def _align(graph: fx.Graph, output: fx.Node, node: fx.Node, user: fx.Node) -> fx.Node:
    """Give ``output [B, *shape of node]`` the rank of its consumer, batch first: where `node` had a batch of one, drop it."""
    shape, rank = shape_of(node), len(shape_of(user))
    if len(shape) == rank:
        return graph.call_function(aten.squeeze.dim, (output, 1))
    for _ in range(rank - 1 - len(shape)):
        output = graph.call_function(aten.unsqueeze.default, (output, 1))
    return output
