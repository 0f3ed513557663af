"""Fuse projections: linear maps of the same input become one op, which streams their weights side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.check import fake_mode_of
from lethe_compile.passes.program import Program, argument, is_call, shape_of

aten = torch.ops.aten
LINEARS = torch.ops.lethe.linears.default
_MOST = 4


@dataclass(frozen=True)
class FuseProjections:
    """Linear maps of one input, such as a layer's queries, keys and values, in one launch.

    ``linear(x, w1, b1), linear(x, w2, b2), …``  =>
    ``y = lethe::linears(x, [w1, w2, …], [b1, b2, …]); slice(y, -1, 0, n1), slice(y, -1, n1, n1 + n2), …``

    Conditions: the weights are matrices of the model, of one dtype with `x`; all have a bias or none has. At most four
    at a time; a map with no sibling becomes an op of its own.
    """

    name: ClassVar[str] = "fuse-projections"

    def run(self, program: Program) -> PassResult:
        groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
        for node in program.graph.nodes:
            if _fusable(node):
                biased = argument(node, 2, "bias") is not None
                groups.setdefault((node.args[0], biased), []).append(node)
        notes = []
        for nodes in groups.values():
            for at in range(0, len(nodes), _MOST):
                notes.append(_fuse(program, nodes[at : at + _MOST]))
        program.module.recompile()
        return PassResult(program, tuple(notes))


def _fusable(node: fx.Node) -> bool:
    if not is_call(node, aten.linear):
        return False
    source: Any = node.args[0]
    weight, bias = node.args[1], argument(node, 2, "bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(shape_of(weight)) != 2:
        return False
    if bias is not None and bias.op != "get_attr":
        return False
    kinds = {n.meta["val"].dtype for n in (source, weight, bias) if n is not None}
    return len(kinds) == 1


def _fuse(program: Program, nodes: list[fx.Node]) -> Note:
    graph = program.graph
    source: Any = nodes[0].args[0]  # asked for now: it may be a map that was fused before
    weights = [n.args[1] for n in nodes]
    biases = [argument(n, 2, "bias") for n in nodes if argument(n, 2, "bias") is not None]
    # All before the first of them: weights are get_attr nodes, which stand at the head of the graph.
    with graph.inserting_before(nodes[0]):
        fused = graph.call_function(LINEARS, (source, weights, biases))
        _copy_meta(nodes[0], fused)
        with fake_mode_of(program):
            width = sum(shape_of(n)[-1] for n in nodes)
            fused.meta["val"] = source.meta["val"].new_empty(*shape_of(source)[:-1], width)
        at = 0
        for node in nodes:
            size = shape_of(node)[-1]
            part = graph.call_function(aten.slice.Tensor, (fused, -1, at, at + size)) if len(nodes) > 1 else fused
            if part is not fused:
                _copy_meta(node, part)
            node.replace_all_uses_with(part)
            at += size
    for node in nodes:
        graph.erase_node(node)
    return Note(fused.name, f"{len(nodes)} linear maps")


def _copy_meta(old: fx.Node, new: fx.Node) -> None:
    new.meta.update({key: value for key, value in old.meta.items() if key != "lethe_operands"})
