"""Complete a decode step that holds only once its rolling caches are full, as guards of torch.compile say of one.

Before, its mask means nothing: the slots that hold a token are not those that it speaks of. A graph of whole sequences
begins there, with every token that there is in sight, as a window has it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lethe_compile.passes.program import Program, is_call
from lethe_compile.passes.step import Steps, refusal
from lethe_compile.passes.step_sites import StepSite, find_sites

aten = torch.ops.aten


def complete_step(program: Program) -> bool:
    """Let attention see every token that there is, and no empty slot, while fewer than `Step.least` came before.

    That is done to each rolling cache that so many tokens fill, and changes nothing once it is full. The number of
    tokens before the step must be an integer among its inputs. The graph is changed in place, if the result says so.

    Raises:
        UnsupportedGraphError: an attention that is written out has no mask.
    """
    assert program.step is not None
    past = next((n for n, role in program.step.roles.items() if role == "position" and _is_number(n)), None)
    if past is None:
        return False
    steps, least = Steps(program), program.step.least
    sites = [s for s in find_sites(program, steps) if s.key.cache.kind == "shift" and s.key.before(steps, 0) <= least]
    for site in sites:
        _complete(program.graph, steps, site, past)
    program.module.recompile()
    return bool(sites)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.SymInt)


def _complete(graph: fx.Graph, steps: Steps, site: StepSite, past: fx.Node) -> None:
    """mask [..., slots] ⇒ itself where past >= slots - 1, else what shows the slots >= slots - 1 - past."""
    sdpa, before = is_call(site.chain[0], aten.scaled_dot_product_attention), site.key.before(steps, 0)
    if site.mask is None and not sdpa:
        reason = f"the cache '{site.key.cache.state.name}' is attended to with no mask, before it is full too"
        raise refusal(site.chain[0], reason, "give attention a mask of the tokens that there are")
    user = next(n for n in site.chain if site.mask is None or site.mask.node in n.all_input_nodes)
    with graph.inserting_before(user):
        empty = graph.call_function(operator.sub, (before, past))
        index = graph.call_function(aten.arange.default, (before + 1,), {"device": steps.device})
        filled = graph.call_function(aten.ge.Scalar, (index, empty))
        if site.mask is None:
            filled.meta["val"] = torch.empty(before + 1, dtype=torch.bool, device="meta")
            user.args = (*user.args[:3], filled)
            user.kwargs = {k: v for k, v in user.kwargs.items() if k != "attn_mask"}
            return
        zero = graph.call_function(aten.arange.default, (1,), {"device": steps.device})
        full = graph.call_function(aten.ge.Scalar, (zero, empty))
        mask = graph.call_function(aten.where.self, (full, site.mask.node, _as_mask(graph, steps, site, filled)))
        mask.meta.update(site.mask.node.meta)
    user.replace_input_with(site.mask.node, mask)


def _as_mask(graph: fx.Graph, steps: Steps, site: StepSite, filled: fx.Node) -> fx.Node:
    """`filled` as the kind of mask that attention takes."""
    assert site.mask is not None
    dtype = site.mask.node.meta["val"].dtype
    if site.mask.denies:
        return graph.call_function(aten.logical_not.default, (filled,))
    if dtype == torch.bool:
        return filled
    options: Any = {"dtype": dtype, "device": steps.device}
    zero = graph.call_function(aten.scalar_tensor.default, (0.0,), options)
    return graph.call_function(aten.where.ScalarOther, (filled, zero, torch.finfo(dtype).min))
