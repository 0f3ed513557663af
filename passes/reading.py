"""What attention that is written out is read as, and the small rewrites that every reading needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.check import fake_mode_of, shapes_alone
from lethe_compile.passes.evaluate import evaluate
from lethe_compile.passes.program import Program, ancestors, is_symbolic, same_size, shape_of

aten = torch.ops.aten

DENYING = -1e4  # a constant at or below it, in place of a score, denies


class NotAttention(Exception):
    """A softmax over tokens that cannot be read as attention; the message says why."""


@dataclass
class Reading:
    """``softmax(softcap * tanh(scale * q·k / softcap) + Σ factor * term, denied where a condition says so) · v``."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    output: fx.Node
    scale: float = 1.0
    tanh: bool = False
    softcap: float | None = None
    terms: list[tuple[fx.Node, float]] = field(default_factory=list)  # added, each times its factor
    allowed: list[tuple[fx.Node, bool]] = field(default_factory=list)  # boolean, and whether it says what is denied
    order: tuple[int, ...] | None = None  # of the output's dimensions, if not batch, head, token, dimension


def as_node(value: Any) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise NotAttention(f"{value} takes part in its scores")
    return value


def constant(program: Program, value: Any) -> float | None:
    """A number, or a tensor of one element that depends on no input; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node) or any(size != 1 for size in shape_of(value)):
        return None
    if not isinstance(value.meta.get("val"), Tensor) or any(n.op == "placeholder" for n in ancestors(value)):
        return None
    return float(evaluate(program.module, value, {}))


def at_rank_4(program: Program, node: fx.Node, before: fx.Node) -> fx.Node:
    """``[batch * heads, T, D]`` and ``[batch, kv_heads, group, T, D]`` as ``[batch, heads, T, D]``."""
    shape, batch = shape_of(node), shape_of(program.input_ids)[0]
    if len(shape) == 4:
        return node
    with program.graph.inserting_before(before):
        if len(shape) == 3:
            heads = quotient(shape[0], batch)
            return call(aten.reshape.default, (node, sizes_of(program, (batch, heads, *shape[1:]))), program)
        if len(shape) == 5:
            return call(aten.flatten.using_ints, (node, 1, 2), program)
    raise NotAttention(f"its operands are of rank {len(shape)}")


def quotient(size: Any, batch: Any) -> int:
    """The number of heads in a size that is batch times heads."""
    expressions = [getattr(getattr(s, "node", None), "expr", s) for s in (size, batch)]
    heads = expressions[0] / expressions[1]
    if not getattr(heads, "is_Integer", isinstance(heads, int)):
        raise NotAttention(f"its operands' first size {size} is no multiple of the batch")
    return int(heads)


def sizes_of(program: Program, shape: tuple[Any, ...]) -> list[Any]:
    """A shape as arguments of a call: dynamic sizes as nodes."""
    graph, ids = program.graph, program.input_ids
    found: list[Any] = []
    for size in shape:
        if not is_symbolic(size):
            found.append(size)
            continue
        dim = next((d for d in (0, 1) if same_size(size, shape_of(ids)[d])), None)
        if dim is not None:
            node = graph.call_function(aten.sym_size.int, (ids, dim))
            node.meta["val"] = shape_of(ids)[dim]
            found.append(node)
        else:
            found.append(-1)
    if found.count(-1) > 1:
        raise NotAttention(f"its shape {shape} has several sizes that are neither batch nor tokens")
    return found


def call(target: Callable[..., Any], args: tuple[Any, ...], program: Program) -> fx.Node:
    """A new node with its value's shape on record."""
    node = program.graph.call_function(target, args)
    given = fx.node.map_arg(args, lambda n: n.meta["val"])
    with shapes_alone(fake_mode_of(program)):
        node.meta["val"] = target(*given)
    return node
