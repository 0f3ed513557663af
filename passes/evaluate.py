"""Run part of a graph on real tensors: how a pass proves what a sub-graph computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.absent import known
from lethe_compile.passes.program import ancestors, attribute


def evaluate(
    module: fx.GraphModule,
    target: fx.Node,
    inputs: Mapping[str, Tensor],
    rewrite: Callable[[fx.Node, Any], Any] | None = None,
    bound: Mapping[fx.Node, Any] | None = None,
) -> Any:
    """The value of `target` with the graph's placeholders bound to `inputs`; only what it depends on is computed.

    `rewrite(node, args)` may replace the positional arguments of a call, or the value of a `get_attr`, which lets a
    proof vary a constant. Nodes in `bound` have the values given there.
    """
    vary = rewrite or (lambda node, args: args)
    values: dict[fx.Node, Any] = dict(bound or {})
    with torch.no_grad():
        for node in ancestors(target, within=values):
            if node in values:
                continue
            if node.op == "placeholder":
                values[node] = inputs[str(node.target)].to(node.meta["val"].dtype)
            elif node.op == "get_attr":
                values[node] = vary(node, known(attribute(module, str(node.target)), str(node.target)))
            else:
                assert callable(node.target), f"{node.name} is a {node.op}"
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*vary(node, args), **kwargs)
    return values[target]


def sample_inputs(tokens: int, *, padding: int = 0, device: torch.device | None = None) -> dict[str, Tensor]:
    """Inputs of a captured decoder: three rows, the second left-padded by `padding`, the third right-padded.

    Returns input_ids (zeros), position_ids and attention_mask, each ``[3, tokens]`` int64.
    """
    mask = torch.ones(3, tokens, dtype=torch.int64, device=device)
    mask[1, :padding], mask[2, tokens - padding :] = 0, 0
    return {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
