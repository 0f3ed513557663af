"""Verification refuses a rewritten graph with any one thing wrong: it must not depend on the passes being right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import lethe_compile as lethe
from lethe_compile.capture import capture
from lethe_compile.models.architectures import build
from lethe_compile.models.plain_decoder import plain
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.limits import max_positions, vocab_size
from lethe_compile.passes.program import CACHED_OP, Program
from lethe_compile.runtime import OptimizedModel
from lethe_compile.verify import verify

aten = torch.ops.aten
ARGUMENTS = {a.name: i for i, a in enumerate(CACHED_OP._schema.arguments)}

Mutation = Callable[[fx.Graph, fx.Node], None]
"""Breaks one attention, the node, of a graph."""


def change(name: str, to: Callable[[Any], Any]) -> Mutation:
    def mutate(graph: fx.Graph, node: fx.Node) -> None:
        node.update_arg(ARGUMENTS[name], to(node.args[ARGUMENTS[name]]))

    return mutate


def through(name: str, target: Any, *args: Any) -> Mutation:
    """The operand `name` goes through one more operator."""

    def mutate(graph: fx.Graph, node: fx.Node) -> None:
        with graph.inserting_before(node):
            changed = graph.call_function(target, (node.args[ARGUMENTS[name]], *args))
        node.update_arg(ARGUMENTS[name], changed)

    return mutate


def swap_keys_and_values(graph: fx.Graph, node: fx.Node) -> None:
    key, value = node.args[ARGUMENTS["key"]], node.args[ARGUMENTS["value"]]
    node.update_arg(ARGUMENTS["key"], value)
    node.update_arg(ARGUMENTS["value"], key)


def leave_out_rotation(graph: fx.Graph, node: fx.Node) -> None:
    """Keys as they are before the position enters: the product with cos of ``k * cos + rotate(k) * sin``."""
    rotated: Any = node.args[ARGUMENTS["key"]]
    node.update_arg(ARGUMENTS["key"], rotated.args[0].args[0])


ANY: dict[str, Mutation] = {
    "the scale dropped": change("scale", lambda scale: 1.0),
    "the scale halved": change("scale", lambda scale: scale / 2),
    "a softcap made up": change("softcap", lambda cap: 1.0),
    "a window made up": change("window", lambda window: 6),
    "keys and values swapped": swap_keys_and_values,
    "heads in another order": through("query", aten.flip.default, [1]),
    "KV heads in another order": through("key", aten.flip.default, [1]),
    "tokens in another order": through("value", aten.flip.default, [2]),
    "positions backwards": through("positions", aten.neg.default),
    "ALiBi made up": lambda graph, node: None,  # set below: it needs a buffer
}
WINDOWED: dict[str, Mutation] = {
    "the window one longer": change("window", lambda window: window + 1),
    "the window one shorter": change("window", lambda window: window - 1),
    "no window": change("window", lambda window: None),
    "chunks for a window": change("chunked", lambda chunked: True),
}
OF_ONE: dict[str, tuple[str, Mutation]] = {
    "no softcap": ("gemma2", change("softcap", lambda cap: None)),
    "another softcap": ("gemma2", change("softcap", lambda cap: cap * 2)),
    "no sinks": ("gpt_oss", change("sinks", lambda sinks: None)),
    "no ALiBi": ("bloom", change("slopes", lambda slopes: None)),
    "a window for chunks": ("llama4_text", change("chunked", lambda chunked: False)),
    "no rotation": ("llama", leave_out_rotation),
}


def make_up_alibi(program: Program, node: fx.Node) -> None:
    program.module.register_buffer("made_up", torch.full((program.sites[0].heads,), 0.3))
    with program.graph.inserting_before(node):
        node.update_arg(ARGUMENTS["slopes"], program.graph.get_attr("made_up"))
    made: Any = node.args[ARGUMENTS["slopes"]]
    made.meta["val"] = program.module.made_up


def broken(model: Any, mutation: Mutation, layer: int) -> None:
    """Compile, break, verify."""
    captured = capture(model)
    result = run_pipeline(captured.program, pipeline(0.9))
    program = result.program
    if mutation is ANY["ALiBi made up"]:
        make_up_alibi(program, program.sites[layer].node)
    else:
        mutation(program.graph, program.sites[layer].node)
    for node in program.graph.nodes:
        if "val" not in node.meta:  # what a mutation inserts has the shape of its operand
            node.meta["val"] = node.args[0].meta["val"]
    program.module.recompile()
    config = lethe.LetheConfig()
    limits = {
        "vocab_size": vocab_size(program),
        "max_positions": max_positions(program, getattr(model, "config", None)),
    }
    verify(captured.original, OptimizedModel(program, config, records=result.records, **limits))


@pytest.mark.parametrize("name", ANY)
def test_a_broken_attention_is_refused(name: str) -> None:
    with pytest.raises(lethe.UnsupportedGraphError, match="computes something else"):
        broken(plain(), ANY[name], layer=1)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_broken_window_is_refused(name: str) -> None:
    with pytest.raises(lethe.UnsupportedGraphError, match="computes something else"):
        broken(build("mistral"), WINDOWED[name], layer=0)


@pytest.mark.parametrize("name", OF_ONE)
def test_a_lost_feature_is_refused(name: str) -> None:
    architecture, mutation = OF_ONE[name]
    with pytest.raises(lethe.UnsupportedGraphError, match="computes something else"):
        broken(build(architecture), mutation, layer=0)


def test_an_unbroken_graph_is_not_refused() -> None:
    broken(build("mistral"), lambda graph, node: None, layer=0)
