"""A graph between two passes, written for people and programs: text, GraphViz, SVG, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from lethe_compile.passes.drawing import draw
from lethe_compile.passes.program import Program, module_path, source_of
from lethe_compile.passes.summary import GraphSummary
from lethe_compile.passes.svg import to_dot, to_svg
from lethe_compile.passes.text import graph_lines, size_text, sizes_named, target_text

KINDS = (".txt", ".dot", ".svg", ".json")


def dump(program: Program, path: Path, facts: dict[str, Any] | None = None) -> list[Path]:
    """Write the graph to `path` with each suffix of `KINDS`, and return the files.

    Text and JSON have every node, the JSON `facts` too; the GraphViz file has all but weights, sizes and the
    tensors of the cache. The SVG folds a large graph layer by layer; see `passes.drawing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    whole = draw(program, most=len(program.graph.nodes))
    contents = {
        ".txt": "\n".join([*graph_lines(program), ""]),
        ".dot": to_dot(whole),
        ".svg": to_svg(draw(program), f"{name}: {whole.nodes} nodes"),
        ".json": json.dumps({**(facts or {}), "graph": graph_dict(program)}, indent=1) + "\n",
    }
    files = [path.with_name(name + suffix) for suffix in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_text(content)
    return files


def graph_dict(program: Program) -> dict[str, Any]:
    """JSON-ready: operators counted, and every node with its call, value, module and source."""
    names = sizes_named(program)
    nodes = [_node(node, names) for node in program.graph.nodes]
    return {"operators": GraphSummary.of(program.graph).to_dict()["ops"], "nodes": nodes}


def _node(node: fx.Node, names: dict[str, str]) -> dict[str, Any]:
    value = node.meta.get("val")
    tensor = value if isinstance(value, Tensor) else None
    return {
        "name": node.name,
        "op": node.op,
        "target": target_text(node),
        "args": [_plain(one, names) for one in node.args],
        "kwargs": {key: _plain(one, names) for key, one in node.kwargs.items()},
        "shape": None if tensor is None else [size_text(size, names) for size in tensor.shape],
        "dtype": None if tensor is None else str(tensor.dtype).removeprefix("torch."),
        "module": module_path(node),
        "source": source_of(node),
    }


def _plain(value: Any, names: dict[str, str]) -> Any:
    """An argument in JSON: nodes by name with a %, numbers and lists as they are, anything else as text."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one, names) for one in value]
    plain = value is None or isinstance(value, (bool, int, str))
    return value if plain or (isinstance(value, float) and abs(value) < float("inf")) else size_text(value, names)
