"""Drawings fold a large graph to a chain of layers, lose no arrow, and come out as well-formed SVG and GraphViz."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import networkx as nx
import pytest

from lethe_compile.capture import capture
from lethe_compile.models.static_decoder import factory as static_decoder
from lethe_compile.models.tiny import tiny
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.drawing import Box, Drawing, draw
from lethe_compile.passes.program import Program
from lethe_compile.passes.svg import to_dot, to_svg
from tests.passes.toy import Toy, causal

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def llama() -> Program:
    """A stack deep enough that nobody could look at its nodes one by one."""
    return capture(tiny("llama", num_hidden_layers=5)).program


@pytest.fixture(scope="module")
def folded(llama: Program) -> Drawing:
    return draw(llama)


def test_a_large_graph_is_folded_by_layer(llama: Program, folded: Drawing) -> None:
    assert folded.nodes == len(llama.graph.nodes) > 300
    assert folded.folded and len(folded.boxes) < 30
    assert sum(box.kind == "attention" for box in folded.boxes) == 5
    for layer in range(5):
        kinds = [box.kind for box in folded.boxes if box.layer == f"model.layers.{layer}"]
        assert kinds == ["block", "attention", "block"], "what comes before its attention, and what after"


def test_folding_makes_a_chain_from_inputs_to_the_output(folded: Drawing) -> None:
    graph = nx.DiGraph(list(folded.arrows))
    assert nx.is_directed_acyclic_graph(graph)
    assert {box.id for box in folded.boxes} == set(graph.nodes)
    (output,) = [box.id for box in folded.boxes if box.kind == "output"]
    attentions = [box.id for box in folded.boxes if box.kind == "attention"]
    for earlier, later in zip(["input_ids", *attentions], [*attentions, output], strict=True):
        assert nx.has_path(graph, earlier, later)


def test_a_small_graph_is_drawn_node_by_node() -> None:
    drawing = draw(capture(Toy(causal)).program)
    assert not drawing.folded and {box.nodes for box in drawing.boxes} == {1}
    (attention,) = [box for box in drawing.boxes if box.kind == "attention"]
    assert "scaled_dot_product_attention" in attention.label


def test_what_a_box_says_of_a_rewritten_attention() -> None:
    program = run_pipeline(capture(tiny("mistral")).program, pipeline(0.9)).program
    boxes = [box for box in draw(program).boxes if box.kind == "attention"]
    assert [box.label for box in boxes] == [f"attention {i}: lethe.attention" for i in range(3)]
    assert boxes[1].detail == "4/2 heads of 16, sliding 7; cache 1"


def test_a_step_shows_the_cache_that_it_carries() -> None:
    drawing = draw(capture(static_decoder()).program)
    (cache,) = [box for box in drawing.boxes if box.kind == "cache"]
    assert "layers.0.attention.kv_cache.k_cache" in cache.detail


@pytest.mark.parametrize("most", [60, 10**6])
def test_svg_and_graphviz_show_every_box_and_arrow(llama: Program, most: int) -> None:
    drawing = draw(llama, most)
    root = ElementTree.fromstring(to_svg(drawing, "a <title> & more"))
    groups = list(root.iter(f"{SVG}g"))
    assert len(groups) == len(drawing.boxes)
    heads = [path for path in root.iter(f"{SVG}path") if path.get("class") == "lg-h"]
    assert len(heads) == len(drawing.arrows), "one arrowhead each"
    dot = to_dot(drawing)
    assert dot.count(" -> ") == len(drawing.arrows) and dot.count("[label=") == len(drawing.boxes)
    assert dot.count("{") == dot.count("}") == 1 + len({box.layer for box in drawing.boxes if box.layer})


def test_boxes_do_not_overlap_and_lie_within_the_picture(folded: Drawing) -> None:
    root = ElementTree.fromstring(to_svg(folded, "llama"))
    width, height = (float(root.get(name, "0")) for name in ("width", "height"))
    places = []
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(name, "0")) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height
        assert all(x >= a + c or x + w <= a or y >= b + d or y + h <= b for a, b, c, d in places)
        places.append((x, y, w, h))


def test_names_are_escaped() -> None:
    hostile = Box('</svg><script>"&', "block", "</title><b>\"&'", "x" * 200, 3, 'layer "0"')
    drawing = Drawing((hostile, Box("b", "output", "b", "", 1)), ((hostile.id, "b"),), 4, True)
    svg = to_svg(drawing, "</title><script>")
    ElementTree.fromstring(svg)
    assert "<script" not in svg and "<b>" not in svg
    assert re.search(r'"</svg><script>\\"&" -> "b"', to_dot(drawing)) and 'label="layer \\"0\\""' in to_dot(drawing)


def test_a_drawing_survives_json(folded: Drawing) -> None:
    assert Drawing.from_dict(json.loads(json.dumps(folded.to_dict()))) == folded
