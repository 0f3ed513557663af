"""What a graph says about the inputs that it can take."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.program import CACHED_OP, Program, ancestors, is_call, shape_of

aten = torch.ops.aten


def vocab_size(program: Program) -> int:
    """Rows of the embedding that the token ids index.

    Raises:
        UnsupportedGraphError: the ids index no embedding.
    """
    for node in program.graph.nodes:
        if is_call(node, aten.embedding) and program.input_ids in ancestors(node.args[1]):
            return int(shape_of(node.args[0])[0])
    raise UnsupportedGraphError("the token ids index no embedding", node="input_ids")


def max_positions(program: Program, config: Any = None) -> int | None:
    """Positions that the model has: rows of a learned table, or what a Hugging Face `config` says; None if neither."""
    limits = [int(shape_of(node.args[0])[0]) for node in program.graph.nodes if _indexes_positions(node, program)]
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(text, "max_position_embeddings", None)
    return min([*limits, *([stated] if isinstance(stated, int) else [])], default=None)


def _indexes_positions(node: fx.Node, program: Program) -> bool:
    positions = program.placeholder("positions")
    if not is_call(node, aten.embedding, aten.index_select):
        return False
    index = node.args[1] if is_call(node, aten.embedding) else node.args[2]
    sources = ancestors(index) if isinstance(index, fx.Node) else []
    return positions in sources and not any(is_call(n, CACHED_OP) for n in sources)
