"""Values that padding tokens get in place of their own: without them, as no row has padding ahead of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lethe_compile.passes.evaluate import evaluate, sample_inputs
from lethe_compile.passes.program import Program, ancestors, is_call, same_sizes, shape_of

aten = torch.ops.aten
_TOKENS, _PADDING = 7, 2


def keep_tokens(program: Program) -> None:
    """``where(is a token, x, other)``  =>  ``x``, where the condition reads the padding mask alone.

    Rows are padded on the right, and nobody reads what stands there. Conditions: one truth a token, which is so for
    every token, shown on samples padded on either side.
    """
    for node in list(program.graph.nodes):
        if not is_call(node, aten.where.self, aten.where.ScalarOther):
            continue
        condition, value = node.args[:2]
        if _is_token(program, condition) and same_sizes(shape_of(value), shape_of(node)):
            node.replace_all_uses_with(value)
            program.graph.erase_node(node)


def _is_token(program: Program, condition: fx.Node) -> bool:
    sources = {str(n.target) for n in ancestors(condition, stop=(aten.sym_size,)) if n.op == "placeholder"}
    if sources != {"attention_mask"} or not same_sizes(shape_of(condition), shape_of(program.input_ids)):
        return False
    inputs = sample_inputs(_TOKENS, padding=_PADDING, device=program.device)
    value: Tensor = evaluate(program.module, condition, inputs)
    return bool(value[inputs["attention_mask"].bool()].all())
