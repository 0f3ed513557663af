"""The runner verifies after every pass: whatever a pass may break is reported with its name and those before it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import pytest
import torch
from torch import fx

from lethe_compile.capture import capture
from lethe_compile.errors import VerificationError
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import PassResult, run_pipeline
from lethe_compile.passes.dump import KINDS
from lethe_compile.passes.locate_attention import LocateAttention
from lethe_compile.passes.normalize import Normalize
from lethe_compile.passes.program import Program
from tests.passes.toy import Toy, causal

aten = torch.ops.aten


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Toy(causal)).program


@pytest.fixture
def program(captured: Program) -> Program:
    return replace(captured, module=copy.deepcopy(captured.module))


@dataclass(frozen=True)
class Breaking:
    """A pass that breaks the graph by `damage`."""

    damage: Callable[[fx.Graph], object]
    name: ClassVar[str] = "breaking"

    def run(self, program: Program) -> PassResult:
        self.damage(program.graph)
        return PassResult(program)


def first(graph: fx.Graph, target: object) -> fx.Node:
    return next(n for n in graph.nodes if n.target is target)


def another_shape(graph: fx.Graph) -> None:
    node = first(graph, aten.linear.default)
    with graph.inserting_before(node):
        node.replace_input_with(node.args[0], graph.call_function(aten.narrow.default, (node.args[0], 0, 0, 1)))


def another_dtype(graph: fx.Graph) -> None:
    node = first(graph, aten.embedding.default)
    with graph.inserting_after(node):
        half = graph.call_function(aten.to.dtype, (node, torch.float64))
    node.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)


def swapped_operands(graph: fx.Graph) -> None:
    node = first(graph, aten.linear.default)
    node.args = (node.args[1], node.args[0], *node.args[2:])


def use_before_definition(graph: fx.Graph) -> None:
    graph.output_node().prev.append(first(graph, aten.embedding.default))


def unknown_input(graph: fx.Graph) -> None:
    with graph.inserting_before(first(graph, "input_ids")):
        graph.placeholder("temperature")


def two_outputs(graph: fx.Graph) -> None:
    output = graph.output_node()
    output.args = ((output.args[0], output.args[0]),)


def module_call(graph: fx.Graph) -> None:
    node = first(graph, aten.embedding.default)
    with graph.inserting_after(node):
        call = graph.call_module("embedding", (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def write(graph: fx.Graph) -> None:
    with graph.inserting_before(graph.output_node()):
        graph.call_function(aten.add_.Tensor, (first(graph, "input_ids"), 1))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (another_shape, r"a value changed: shape .* became"),
        (another_dtype, r"does not compute|dtype torch.float32 became torch.float64"),
        (swapped_operands, r"does not compute|shape"),
        (use_before_definition, "the graph is malformed"),
        (unknown_input, "the graph has an input 'temperature', which no role explains"),
        (two_outputs, "the graph must return one tensor"),
        (module_call, "a call_module, which no pass should leave"),
        (write, "aten.add_.Tensor writes 'input_ids'"),
    ],
)
def test_a_broken_graph_is_reported_with_its_pass(
    program: Program, damage: Callable[[fx.Graph], object], reason: str
) -> None:
    with pytest.raises(VerificationError, match=reason) as broken:
        run_pipeline(program, [Normalize(), LocateAttention(), Breaking(damage)])
    assert "pass breaking, after normalize, locate-attention" in str(broken.value)
    if damage is not use_before_definition:
        assert broken.value.node is not None


def test_a_sound_pass_is_recorded_observed_and_dumped(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LETHE_DUMP", str(tmp_path / "graphs"))
    seen: list[tuple[str, int]] = []
    steps = pipeline(None)
    records = run_pipeline(
        program, steps, lambda record, after: seen.append((record.name, len(after.graph.nodes)))
    ).records
    assert seen == [(r.name, r.nodes) for r in records] and [r.name for r in records] == [p.name for p in steps]
    written = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    names = ["captured", *(p.name for p in steps)]
    assert written == sorted(f"{i:02d}-{name}{kind}" for i, name in enumerate(names) for kind in KINDS)
    assert "lethe.attention.default" in (tmp_path / "graphs/09-insert-attention.txt").read_text()
    drawn = (tmp_path / "graphs/09-insert-attention.dot").read_text()
    assert drawn.startswith("digraph {") and '"input_ids" -> "embedding"' in drawn
    ElementTree.parse(tmp_path / "graphs/09-insert-attention.svg")
    read = json.loads((tmp_path / "graphs/09-insert-attention.json").read_text())
    assert read["name"] == "insert-attention" and len(read["matches"]) == 1
    assert {"name", "op", "target", "args", "shape", "module"} <= read["graph"]["nodes"][0].keys()


def test_without_the_variable_nothing_is_dumped(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LETHE_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    run_pipeline(program, [Normalize()])
    assert list(tmp_path.iterdir()) == []
