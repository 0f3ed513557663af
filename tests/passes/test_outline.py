"""Outlining: spans between attention ops, equal ones named once, together the graph they were cut from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lethe_compile.capture import capture
from lethe_compile.executor import Executor
from lethe_compile.models.plain_decoder import plain
from lethe_compile.models.tiny import CONFIGS, tiny
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.outline import outline
from lethe_compile.passes.program import Program


def program(model: Any, *, fuse: bool = False) -> Program:
    return run_pipeline(capture(model).program, pipeline(0.9, True, fuse=fuse)).program


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in CONFIGS), "plain"]
)
def test_repeated_layers_are_one_region(name: str) -> None:
    compiled = program(plain() if name == "plain" else tiny(name))
    cut = outline(compiled)
    layers = len(compiled.sites)
    assert [span.region for span in cut.spans] == [0, *[1] * (layers - 1), 2]
    assert len(cut.regions) == 3
    for span, region in zip(cut.spans[:2], cut.regions[:2], strict=True):
        placeholders = [n for n in region.graph.nodes if n.op == "placeholder"]
        assert len(placeholders) == len(span.inputs)
        assert len(region.graph.output_node().args[0]) == len(span.outputs)


def test_layers_that_differ_are_regions_of_their_own() -> None:
    model = tiny("llama", num_hidden_layers=5)
    model.model.layers[2].mlp.act_fn = torch.nn.GELU()
    cut = outline(program(model))
    # The span before layer 2's attention ends in its projections; the one behind it holds its MLP.
    assert [span.region for span in cut.spans] == [0, 1, 1, 2, 1, 3]


def test_numbers_that_differ_keep_layers_apart() -> None:
    model = tiny("llama", num_hidden_layers=4)
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3
    assert [span.region for span in outline(program(model)).spans] == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "plain"])
def test_spans_compute_the_graph(name: str, fuse: bool) -> None:
    compiled = program(plain() if name == "plain" else tiny(name), fuse=fuse)
    ids = torch.randint(97, (2, 11))
    state = empty_state(compiled, rows=2, tokens=11)
    positions, new = torch.arange(11).repeat(2, 1), torch.tensor([11, 7], dtype=torch.int32)
    inputs = {"input_ids": ids, "positions": positions, "new_lengths": new}
    order = [str(n.target) for n in compiled.placeholders()]
    copies = {name: tensor.clone() for name, tensor in state.items()}
    expected = compiled.module(*({**inputs, **copies}[name] for name in order))
    copies = {name: tensor.clone() for name, tensor in state.items()}
    actual = Executor(compiled, compiled=False).run(ids, positions, new, copies)
    assert torch.equal(actual, expected)
    copies = {name: tensor.clone() for name, tensor in state.items()}
    last = Executor(compiled, compiled=False).run(ids, positions, new, copies, new.long() - 1)
    assert last.shape == (2, 1, 97)
    torch.testing.assert_close(last[:, 0], expected[torch.arange(2), new.long() - 1])


def empty_state(compiled: Program, rows: int, tokens: int) -> dict[str, Tensor]:
    """The cache's tensors, with a page of `tokens` for each layer and row."""
    layers, state = len(compiled.sites), {}
    for site in compiled.sites:
        pool = site.cache_group
        state[f"k_pages_{pool}"] = torch.zeros(layers * rows, site.kv_heads, tokens, site.k_dim)
        state[f"v_pages_{pool}"] = torch.zeros(layers * rows, site.kv_heads, tokens, site.v_dim)
        state[f"slot_position_{pool}"] = torch.zeros(layers * rows, tokens, dtype=torch.int32)
        state[f"slot_mass_{pool}"] = torch.zeros(layers * rows, tokens)
    state["page_table"] = torch.arange(layers * rows, dtype=torch.int32).view(layers, rows, 1)
    state["length"] = torch.zeros(layers, rows, dtype=torch.int32)
    return state
