"""Graphs as text: one line a node, readable sizes, and differences that name what a pass changed."""

from __future__ import annotations

import torch
from torch import Tensor

from lethe_compile.capture import capture
from lethe_compile.passes.classify_masks import ClassifyMasks
from lethe_compile.passes.text import difference, graph_lines
from tests.passes.toy import Toy, masked, program_after


def tril(toy: Toy, tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def test_a_line_a_node() -> None:
    program = capture(Toy(masked(tril))).program
    lines = graph_lines(program)
    assert len(lines) == len(program.graph.nodes)
    assert "input %input_ids: i64[B, T]" in lines
    assert lines[-1].startswith("return %linear")
    (attention,) = [line for line in lines if "= aten.scaled_dot_product_attention" in line]
    assert ": f32[B, 4, T, 8] = aten.scaled_dot_product_attention.default(%" in attention
    assert "enable_gqa=True" in attention
    (weight,) = [line for line in lines if "= attribute embedding.weight" in line]
    assert weight.startswith("%embedding_weight: f32[29, 32]")


def test_a_difference_is_what_the_pass_changed() -> None:
    program = program_after(Toy(masked(tril)), "content-masks")
    before = graph_lines(program)
    after = graph_lines(ClassifyMasks().run(program).program)
    changes = list(difference(before, after, "classify-masks"))
    assert changes[:2] == ["--- before classify-masks", "+++ after classify-masks"]
    removed = [line for line in changes[2:] if line.startswith("-")]
    added = [line for line in changes[2:] if line.startswith("+")]
    assert any("aten.tril" in line for line in removed) and all("aten.tril" not in line for line in after)
    assert len(added) == 1 and "lethe.attention_site.default" in added[0], "the attention, without its mask"
    assert not list(difference(after, after, "again"))
