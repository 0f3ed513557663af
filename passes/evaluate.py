"""Run part of a graph on real tensors: how a pass proves what a sub-graph computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.program import ancestors, attribute


def evaluate(
    module: fx.GraphModule,
    target: fx.Node,
    inputs: Mapping[str, Tensor],
    rewrite: Callable[[fx.Node, Any], Any] | None = None,
) -> Any:
    """The value of `target` with the graph's placeholders bound to `inputs`; only what it depends on is computed.

    `rewrite(node, args)` may replace the positional arguments of a call, which lets a proof vary a constant.
    """
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in ancestors(target):
            if node.op == "placeholder":
                values[node] = inputs[str(node.target)]
            elif node.op == "get_attr":
                values[node] = attribute(module, str(node.target))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*(rewrite(node, args) if rewrite else args), **kwargs)
    return values[target]


def sample_inputs(rows: int, tokens: int, *, padding: int = 0, token: int = 0, device: Any = None) -> dict[str, Tensor]:
    """Inputs of a captured decoder: `rows` sequences of one repeated token, the last row left-padded by `padding`.

    Returns input_ids, position_ids and attention_mask, each ``[rows, tokens]`` int64.
    """
    mask = torch.ones(rows, tokens, dtype=torch.long, device=device)
    mask[-1, :padding] = 0
    ids = torch.full_like(mask, token)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
