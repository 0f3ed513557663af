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
from lethe_compile.passes.evaluate import evaluate
from lethe_compile.passes.program import (
    Program,
    ancestors,
    argument,
    attribute,
    is_call,
    operand,
    remove_dead,
    same_size,
    shape_of,
    source_of,
)

aten = torch.ops.aten

_ELEMENTWISE = (aten.add, aten.sub, aten.mul, aten.div, aten.where, aten.addcmul, aten.complex, aten.expand_as)
_ROWWISE = (aten.gather, aten.masked_fill)  # take an operand with a batch in front as well
_KEYS = 7  # positions of keys in the sample
_SAMPLE = (2, 0, 3, 1)  # positions, in no order, on which a region is shown to treat each token by itself


@dataclass(frozen=True)
class RewritePositions:
    """Make token positions an input.

    ============================================================  =====================================================
    before                                                        after
    ============================================================  =====================================================
    input `position_ids`                                          input `positions`
    ``arange(T)``, ``arange(T) + c``, ``arange(c, T + c)``        ``positions[row]`` (+ c), computed for every row
    ``table[c : T + c]``, rows of a constant                      ``table[positions[row] + c]``
    ============================================================  =====================================================

    A graph that counts its tokens once computes with ``[T]`` or ``[1, T]`` what rows now need for themselves: the
    sub-graph that depends on the count alone is mapped over rows with `torch.vmap`, and its results meet the rest of
    the graph with a batch dimension in front. Conditions: they meet it in an elementwise operator, which broadcasts,
    and each token's result comes from its own position alone, which is shown by running the region on each by itself.
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
        fixed = _fixed(program.graph)
        counters = [n for n in program.graph.nodes if counts_tokens(n, program, fixed)]
        if counters:
            _map_over_rows(program, counters, fixed)
            notes += [Note(n.name, "counted the tokens of the input: now per row") for n in counters]
        remove_dead(program.graph)
        refuse_other_counts(program)
        program.module.recompile()
        return PassResult(program, tuple(notes))


def refuse_other_counts(program: Program) -> None:
    """Refuse what depends on the number of tokens and is no count of them, such as ``arange(0, 2 * T, 2)``.

    A tensor made from sizes alone must be the same for each token, whatever their number; a size may only be a shape.
    """
    fixed = _fixed(program.graph)
    for node in fixed:
        users = [user for user in node.users if user not in fixed]
        if not users or not any(is_call(n, aten.sym_size) and n.args[1] == 1 for n in ancestors(node)):
            continue
        ids = [torch.zeros(2, tokens, dtype=torch.int64, device=program.device) for tokens in (9, 1)]
        inputs = [{"input_ids": x, "positions": x, "seen": x[0]} for x in ids]
        several, one = (evaluate(program.module, node, each) for each in inputs)
        if not isinstance(several, Tensor):
            varies = any(is_call(user, *_ELEMENTWISE) for user in users)
        elif any(size != 9 for size, least in zip(several.shape, one.shape, strict=True) if size != least):
            varies = False  # numbers the tokens of the whole batch, as a mixture of experts does to sort them
        else:
            varies = not torch.equal(several, one.expand_as(several))
        if varies:
            raise _refusal(users[0], f"'{node.name}' depends on the number of tokens and is not their positions")


def _add_positions(program: Program) -> None:
    ids = program.input_ids
    with program.graph.inserting_after(program.placeholders()[-1]):
        node = program.graph.placeholder("positions")
    node.meta["val"] = torch.empty_like(ids.meta["val"], dtype=torch.int64)


def _fixed(graph: fx.Graph) -> dict[fx.Node, None]:
    """Nodes computed from constants, sizes, and the positions that all rows share as keys, in graph order."""
    fixed: dict[fx.Node, None] = {}
    for node in graph.nodes:
        computed = node.op == "call_function" and all(n in fixed for n in node.all_input_nodes)
        if node.op == "get_attr" or node.target == "seen" or computed or is_call(node, aten.sym_size):
            fixed[node] = None
    return fixed


def counts_tokens(node: fx.Node, program: Program, fixed: dict[fx.Node, None]) -> bool:
    """Whether `node` is ``arange(c, T + c)`` or T consecutive rows of a constant from row c on."""
    shape, tokens = shape_of(node), shape_of(program.input_ids)[1]
    if is_call(node, aten.arange):
        step = argument(node, 2, "step", 1) if is_call(node, aten.arange.start_step) else 1
        return same_size(shape[0], tokens) and step == 1 and isinstance(start_of(node), (int, float))
    if is_call(node, aten.slice) and operand(node) in fixed:
        rows = shape[_dim(node)]
        return same_size(rows, tokens) and not same_size(rows, shape_of(operand(node))[_dim(node)])
    return False


def start_of(node: fx.Node) -> Any:
    """The first value of an `arange`, or the first row of a slice."""
    if is_call(node, aten.slice):
        return argument(node, 2, "start") or 0
    return node.args[0] if is_call(node, aten.arange.start, aten.arange.start_step) else 0


def _dim(node: fx.Node) -> int:
    return int(argument(node, 1, "dim", 0)) % len(shape_of(node))


def _map_over_rows(program: Program, counters: list[fx.Node], fixed: dict[fx.Node, None]) -> None:
    """Replace the sub-graph that depends on the token count alone by one that depends on `positions`."""
    inside = {n: None for n in fixed if any(c in counters for c in ancestors(n))}
    frontier = [n for n in inside if any(user not in inside for user in n.users)]
    for node in frontier:
        _check_consumers(program, node, inside)
    outside = {n for n in fixed if n not in inside}
    constants = [n for n in outside if n.op != "call_function" and any(n in ancestors(i) for i in inside)]
    seen = torch.arange(_KEYS, device=program.device)
    examples = [seen if c.op == "placeholder" else attribute(program.module, str(c.target)) for c in constants]
    region = _trace_region(program, counters, inside, frontier, dict(zip(constants, examples, strict=True)))
    _check_tokenwise(program, region, frontier, examples)
    anchor = next(iter(inside))
    outputs = _inline(program, region, anchor, [program.placeholder("positions"), *constants])
    for node, output in zip(frontier, outputs, strict=True):
        for user in [u for u in node.users if u not in inside]:
            with program.graph.inserting_before(user):
                aligned = _align(program.graph, output, node, user)
            user.replace_input_with(node, aligned)


def _check_consumers(program: Program, node: fx.Node, inside: dict[fx.Node, None]) -> None:
    """Every consumer must broadcast, batch first, and see at most one token dimension."""
    batch, tokens = shape_of(program.input_ids)
    shape = shape_of(node)
    if sum(same_size(size, tokens) for size in shape) != 1:
        sizes = ", ".join(map(str, shape))
        raise _refusal(node, f"'{node.name}' [{sizes}], computed from the token count, is not one value a token")
    for user in [u for u in node.users if u not in inside]:
        broadcast = shape_of(user)
        batched = bool(broadcast) and same_size(broadcast[0], batch)
        own = len(shape) < len(broadcast) or same_size(shape[0], 1) or same_size(shape[0], batch)
        if not is_call(user, *_ELEMENTWISE, *_ROWWISE) or not batched or not own:
            target = f"'{user.name}' ({user.target})"
            raise _refusal(user, f"token positions computed at '{node.name}' enter {target}, which does not broadcast")


def _refusal(node: fx.Node, reason: str) -> UnsupportedGraphError:
    hint = "give the model a position_ids input of shape [batch, tokens]"
    return UnsupportedGraphError(reason, node=node.name, where=source_of(node) or None, hint=hint)


def _trace_region(
    program: Program,
    counters: list[fx.Node],
    inside: dict[fx.Node, None],
    frontier: list[fx.Node],
    constants: dict[fx.Node, Tensor],
) -> fx.GraphModule:
    """The region as a graph of its own, ``(positions [B, T], *constants) -> frontier values [B, …]``."""
    graph = fx.Graph()
    row = graph.placeholder("row")
    values: dict[fx.Node, Any] = {c: graph.placeholder(f"constant_{i}") for i, c in enumerate(constants)}
    tokens = graph.call_method("size", (row, 0))  # vmap has no rule for aten.sym_size
    batch, length = shape_of(program.input_ids)
    wanted = {a for n in inside for a in ancestors(n)}
    for node in program.graph.nodes:
        size = node.meta.get("val")
        if node not in wanted or node.op == "placeholder" or node in constants:  # those have their values already
            continue
        if node in counters:
            values[node] = _counted(graph, node, row, values)
        elif same_size(size, batch):
            values[node] = 1  # inside the map a row is a batch of one
        elif same_size(size, length):
            values[node] = tokens
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[n] for n in frontier))
    graph.eliminate_dead_code()
    example = torch.zeros(2, 9, dtype=torch.int64, device=program.device)
    mapped = _per_row(fx.GraphModule(nn.Module(), graph))
    return make_fx(mapped, tracing_mode="symbolic")(example, *constants.values())


def _per_row(region: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """Map a region ``f(positions [T], *constants)`` over the rows of ``positions [B, T]``."""

    def mapped(positions: Tensor, *constants: Tensor) -> tuple[Tensor, ...]:
        return torch.vmap(lambda row: region(row, *constants))(positions)  # type: ignore[no-any-return]

    return mapped


def _counted(graph: fx.Graph, node: fx.Node, row: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """What a counter becomes for one row of positions."""
    start = start_of(node)
    counted = graph.call_function(aten.add.Tensor, (row, start)) if start else row
    if is_call(node, aten.slice):
        indices = [None] * _dim(node) + [counted]  # vmap of index_select would fix the number of rows
        return graph.call_function(aten.index.Tensor, (values[operand(node)], indices))
    dtype = node.meta["val"].dtype
    return counted if dtype == torch.int64 else graph.call_function(aten.to.dtype, (counted, dtype))


def _check_tokenwise(
    program: Program, region: fx.GraphModule, frontier: list[fx.Node], constants: list[Tensor]
) -> None:
    """Run the region on positions together and one by one: a token's values must depend on its own position alone."""
    tokens = shape_of(program.input_ids)[1]
    positions = torch.tensor([_SAMPLE] * 3, device=program.device)
    with torch.no_grad():
        together = region(positions, *constants)
        for column in range(len(_SAMPLE)):
            alone = region(positions[:1, column : column + 1], *constants)
            for node, whole, single in zip(frontier, together, alone, strict=True):
                dim = 1 + next(d for d, size in enumerate(shape_of(node)) if same_size(size, tokens))
                expected = single.select(dim, 0).expand_as(whole.select(dim, column))
                if not torch.allclose(whole.select(dim, column), expected, rtol=1e-4, equal_nan=True):
                    raise _refusal(node, f"'{node.name}', computed from the token count, mixes positions")


def _inline(program: Program, region: fx.GraphModule, before: fx.Node, inputs: list[Any]) -> list[fx.Node]:
    """Copy a traced region into the graph; its outputs as nodes there."""
    own = [n for n in region.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(own, inputs, strict=True))
    skipped = (aten._assert_tensor_metadata, aten._assert_scalar)
    with program.graph.inserting_before(before):
        for node in region.graph.nodes:
            if node.op == "output":
                outputs: Any = fx.node.map_arg(node.args[0], lambda n: values[n])
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
    """Give ``output [B, *shape of node]`` the rank of its consumer, batch first: a batch of one in `node` goes."""
    shape, rank = shape_of(node), len(shape_of(user))
    if len(shape) == rank:
        return graph.call_function(aten.squeeze.dim, (output, 1))
    for _ in range(rank - 1 - len(shape)):
        output = graph.call_function(aten.unsqueeze.default, (output, 1))
    return output
