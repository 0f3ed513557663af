"""A graph summed up, and what should not be in a finished one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

import lethe_compile as lethe
from lethe_compile.models.tiny import tiny
from lethe_compile.passes.program import CACHED_OP, SITE_OP, Program
from lethe_compile.passes.summary import GraphSummary, op_name, unexpected_ops


@pytest.fixture(scope="module")
def made() -> tuple[Program, GraphSummary]:
    fast = lethe.optimize(tiny("llama"), verified=False)
    assert fast.captured is not None
    return fast.program, fast.captured.summary


def altered(program: Program) -> tuple[Program, fx.Node]:
    """A copy of the program whose graph may be changed, and its first cached attention."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, nodes))
    sites = tuple(replace(site, node=nodes[site.node]) for site in program.sites)
    module = fx.GraphModule(program.module, graph)
    return replace(program, module=module, sites=sites), sites[0].node


def test_a_finished_program_holds_nothing_unexpected(made: tuple[Program, GraphSummary]) -> None:
    program, before = made
    assert unexpected_ops(program, before) == () == unexpected_ops(altered(program)[0], None)
    after = GraphSummary.of(program.graph)
    assert after.ops["lethe::attention"] == 3 and sum(after.ops.values()) < after.nodes == len(program.graph.nodes)
    assert list(after.ops.values()) == sorted(after.ops.values(), reverse=True)
    ids = after.inputs[0]
    assert (ids.name, ids.dtype) == ("input_ids", "int64") and len(ids.shape) == 2 and not ids.shape[1].isdigit()


def test_what_does_not_belong_is_named(made: tuple[Program, GraphSummary]) -> None:
    program, before = made
    changed, attention = altered(program)
    graph = changed.graph
    with graph.inserting_after(attention):
        softmax = graph.call_function(torch.ops.aten._softmax.default, (attention, -1, False))
        softmax.meta["val"] = changed.input_ids.meta["val"]  # its last size is that of the tokens
        experts = graph.call_function(torch.ops.aten._softmax.default, (attention, -1, False))
        experts.meta["val"] = torch.empty(2, 8)  # that of experts may stay
        graph.call_function(torch.ops.aten.copy_.default, (attention, attention))
        graph.call_function(SITE_OP, ())
        alien = graph.call_function(torch.ops.quantized.relu6.default, (attention,))
    found = {one.op: one for one in unexpected_ops(changed, before)}
    assert set(found) == {"aten::_softmax", "aten::copy_", "lethe::attention_site", "quantized::relu6"}
    assert found["aten::_softmax"].count == 1 and "not pruned" in found["aten::_softmax"].reason
    known = replace(before, ops={**before.ops, op_name(alien): 1})
    assert "quantized::relu6" not in {one.op for one in unexpected_ops(changed, known)}, "the model's own"


def test_a_layer_too_many_is_named(made: tuple[Program, GraphSummary]) -> None:
    changed, attention = altered(made[0])
    with changed.graph.inserting_after(attention):
        changed.graph.call_function(CACHED_OP, attention.args)
    (one,) = unexpected_ops(changed, made[1])
    assert str(one) == "lethe::attention (4 ×): 3 attention layers were located"
