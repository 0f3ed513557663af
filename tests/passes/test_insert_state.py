"""State: calls of stateful modules get their tensors as inputs; what cannot be one is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lethe_compile.capture import capture
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.insert_state import InsertState
from lethe_compile.passes.outline import outline
from lethe_compile.passes.program import STATEFUL_OP, STATEFUL_SITE_OP, Program, is_call, shape_of
from tests.hybrids import hybrid


@pytest.fixture
def program() -> Program:
    return capture(hybrid("lfm2")).program


def sites(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if is_call(node, STATEFUL_SITE_OP)]


def test_whole_sequences_are_the_models_own_before_insertion() -> None:
    model = hybrid("lfm2")
    captured = capture(model)
    ids = torch.randint(97, (2, 11))
    given = {"input_ids": ids, "position_ids": torch.arange(11).repeat(2, 1), "attention_mask": torch.ones_like(ids)}
    logits: Tensor = captured.program.module(*(given[str(n.target)] for n in captured.program.placeholders()))
    torch.testing.assert_close(logits, captured.original(given), rtol=1e-4, atol=1e-4)


def test_states_become_inputs_that_the_op_alone_writes(program: Program) -> None:
    assert len(sites(program)) == 2
    program = run_pipeline(program, pipeline(0.9)).program
    shapes = {str(n.target): shape_of(n) for n in program.placeholders()}
    assert list(shapes)[2:6] == ["has_previous_state", "new_lengths", "state_0_0", "state_1_0"]
    assert [tuple(map(str, shapes[f"state_{i}_0"])) for i in (0, 1)] == [(str(shapes["input_ids"][0]), "64", "3")] * 2
    calls = [node for node in program.graph.nodes if is_call(node, STATEFUL_OP)]
    assert len(calls) == 2 and not sites(program)
    assert set(calls) < set(outline(program).cuts)


def test_a_graph_without_one_is_left_as_it_is() -> None:
    from lethe_compile.models.tiny import tiny

    program = capture(tiny("llama")).program
    nodes = list(program.graph.nodes)
    assert InsertState().run(program).matches == ()
    assert list(program.graph.nodes) == nodes


def test_a_mask_that_is_not_of_padding_is_refused(program: Program) -> None:
    node = sites(program)[1]
    node.update_arg(1, [program.input_ids])
    with pytest.raises(
        UnsupportedGraphError, match=r"'input_ids', which a stateful module gets .* is no mask of padding"
    ):
        InsertState().run(program)


def test_an_operand_laid_out_otherwise_is_refused(program: Program) -> None:
    node = sites(program)[0]
    (operand,) = node.args[0]  # type: ignore[misc]
    with program.graph.inserting_before(node):
        turned = program.graph.call_function(torch.ops.aten.transpose.int, (operand, 0, 1))
    turned.meta["val"] = operand.meta["val"].transpose(0, 1)  # type: ignore[union-attr]
    node.update_arg(0, [turned])
    with pytest.raises(UnsupportedGraphError, match="enters a stateful module and has not the layout"):
        InsertState().run(program)


def test_a_call_that_got_lost_is_refused(program: Program) -> None:
    node = sites(program)[0]
    (operand,) = node.args[0]  # type: ignore[misc]
    node.replace_all_uses_with(operand)  # type: ignore[arg-type]
    program.graph.erase_node(node)
    with pytest.raises(UnsupportedGraphError, match="a stateful module is 0 times in the graph, and once in the model"):
        InsertState().run(program)


def test_an_attention_too_many_or_too_few_is_refused(program: Program) -> None:
    assert program.expected_layers == 2, "as many as cache keys and values, of four layers"
    with pytest.raises(UnsupportedGraphError, match="the model attends 3 times, 2 attentions were located"):
        run_pipeline(replace(program, expected_layers=3), pipeline(0.9))
