"""What a graph says about the inputs that it can take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.evaluate import evaluate
from lethe_compile.passes.program import Program, ancestors, argument, is_call, shape_of

aten = torch.ops.aten


def vocab_size(program: Program) -> int:
    """Rows of the embedding that the token ids index.

    Raises:
        UnsupportedGraphError: the ids index no embedding.
    """
    for node in program.graph.nodes:
        if is_call(node, aten.embedding) and program.input_ids in ancestors(argument(node, 1, "indices")):
            return int(shape_of(argument(node, 0, "weight"))[0])
    raise UnsupportedGraphError("the token ids index no embedding", node="input_ids")


def max_positions(program: Program, config: Any = None) -> int | None:
    """Tokens that a sequence may have: None without a limit.

    The least of the rows of learned position tables, of the sizes of stored masks, of the room in a static cache of the
    graph's own, and of what a Hugging Face `config` says, times the factor by which "dynamic" rotary embeddings stretch
    that.
    """
    limits = [*_position_tables(program), *(s.mask.longest for s in program.sites if s.mask and s.mask.longest)]
    limits += [program.longest] if program.longest is not None else []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(text, "max_position_embeddings", None)
    return min([*limits, *([int(stated * _stretch(text))] if isinstance(stated, int) else [])], default=None)


def _stretch(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    parameters = [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]  # one for each kind of layer
    return max((float(p["factor"]) for p in parameters if "dynamic" in str(p.get("rope_type"))), default=1.0)


def _position_tables(program: Program) -> Iterator[int]:
    """Rows of every constant table that positions index, less those before the first position's."""
    positions = program.placeholder("positions")
    for node in program.graph.nodes:
        table, dim, index = _lookup(node)
        if not isinstance(index, fx.Node) or positions not in (sources := ancestors(index)):
            continue
        if all(n is positions or n is program.input_ids for n in sources if n.op == "placeholder"):
            zero = torch.zeros(1, 1, dtype=torch.int64, device=program.device)
            first, second = (
                int(evaluate(program.module, index, {"positions": zero + at, "input_ids": zero}).flatten()[0])
                for at in (0, 1)
            )
            if second != first:  # a table of segments is indexed by what all positions share
                yield int(shape_of(table)[dim]) - first


def _lookup(node: fx.Node) -> tuple[Any, int, Any]:
    """The table that a call looks up in, along which dimension, by which index; the index is None for another call."""
    if is_call(node, aten.embedding):
        return argument(node, 0, "weight"), 0, argument(node, 1, "indices")
    if is_call(node, aten.index_select):
        return argument(node, 0, "self"), argument(node, 1, "dim"), argument(node, 2, "index")
    if is_call(node, aten.index):
        indices = argument(node, 1, "indices")
        return argument(node, 0, "self"), len(indices) - 1, indices[-1]
    return None, 0, None
