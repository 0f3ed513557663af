"""What is added to scores and what denies them, told apart: one mask and one bias of an `attention_site`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lethe_compile.passes.check import fake_mode_of
from lethe_compile.passes.evaluate import evaluate, sample_inputs
from lethe_compile.passes.program import (
    SITE_OP,
    Program,
    ancestors,
    argument,
    is_call,
    is_symbolic,
    operand,
    same_size,
    shape_of,
)
from lethe_compile.passes.reading import DENYING, Reading, as_node, at_rank_4, call, constant, quotient, sizes_of

aten = torch.ops.aten

_TOKENS, _PADDING = 13, 2  # of the sample on which terms are told apart
_SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)


def split(program: Program, r: Reading, before: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """What denies and what biases, each as one operand broadcastable to ``[batch, heads, T, S]``."""
    added: dict[bool, list[fx.Node]] = {True: [], False: []}  # terms that deny, terms that do not
    heads = int(shape_of(at_rank_4(program, r.query, before))[1])
    for term, factor, denies in _unfolded(program, r):
        node = _broadcastable(program, term, heads)
        if factor != 1.0 and not (denies and factor > 0):
            node = call(aten.mul.Tensor, (node, factor), program)
        added[denies].append(node)
    conditions = []
    for condition, denied in r.allowed:
        node = _broadcastable(program, condition, heads)
        conditions.append(call(aten.logical_not.default, (node,), program) if denied else node)
    mask = _joined(program, aten.bitwise_and.Tensor, conditions)
    if mask is not None and added[True]:
        mask = call(aten.where.ScalarOther, (mask, _zero(program), -torch.inf), program)
    mask = _joined(program, aten.add.Tensor, [*([] if mask is None else [mask]), *added[True]])
    return mask, _joined(program, aten.add.Tensor, added[False])


def _joined(program: Program, target: Callable[..., Any], nodes: list[fx.Node]) -> fx.Node | None:
    joined: fx.Node | None = None
    for node in nodes:
        joined = node if joined is None else call(target, (joined, node), program)
    return joined


def _zero(program: Program) -> fx.Node:
    node = program.graph.call_function(aten.zeros.default, ([],), {"device": program.device})
    with fake_mode_of(program):
        node.meta["val"] = torch.zeros([], device=program.device)
    return node


def _broadcastable(program: Program, node: fx.Node, heads: int) -> fx.Node:
    """A term of rank 3 that counts batch and heads in one, ``[batch * heads, …]``, with both apart.

    A term expanded to the size of the scores is what it was before: ``expand_as(mask, scores)`` would have the mask
    read everything that the scores are made from.
    """
    while is_call(node, aten.expand_as, aten.expand) and len(shape_of(operand(node))) == len(shape_of(node)):
        node = as_node(operand(node))
    shape, batch = shape_of(node), shape_of(program.input_ids)[0]
    if len(shape) == 3 and is_symbolic(shape[0]) and not same_size(shape[0], batch):
        own = quotient(shape[0], batch)
        return call(
            aten.reshape.default, (node, [*sizes_of(program, (batch, own)), *sizes_of(program, shape[1:])]), program
        )
    if len(shape) == 3 and heads == shape[0]:
        return call(aten.unsqueeze.default, (node, 0), program)
    if len(shape) == 5:
        return call(aten.flatten.using_ints, (node, 1, 2), program)
    return node


def _unfolded(program: Program, r: Reading) -> list[tuple[fx.Node, float, bool]]:
    """Added terms, their factors, and whether they deny; what does both is taken apart, into `r.allowed` too."""
    found, pending = [], list(r.terms)
    while pending:
        term, factor = pending.pop(0)
        denies, biases = _effects(program, term, factor)
        if denies and biases and factor > 0 and (parts := _parts(program, r, term)):
            pending += [(part, own * factor) for part, own in parts]
        else:
            found.append((term, factor, denies and not biases))
    return found


def _effects(program: Program, node: fx.Node, factor: float = 1.0) -> tuple[bool, bool]:
    """Whether a term times its factor denies, and whether it also has values that bias, on a sample with padding."""
    if any(is_call(n, SITE_OP, *_SOFTMAX) for n in ancestors(node)):
        return False, True
    inputs = sample_inputs(_TOKENS, padding=_PADDING, device=program.device)
    value = evaluate(program.module, node, inputs) * factor
    denied = value <= DENYING
    return bool(denied.any()), bool(((value != 0) & ~denied).any())


def _parts(program: Program, r: Reading, node: fx.Node) -> list[tuple[fx.Node, float]]:
    """What a term that denies and biases is put together from; none if it cannot be told."""
    if is_call(node, aten.add, aten.sub) and all(isinstance(a, fx.Node) for a in node.args[:2]):
        sign = float(argument(node, 2, "alpha", 1)) * (-1.0 if is_call(node, aten.sub) else 1.0)
        return [(as_node(node.args[0]), 1.0), (as_node(node.args[1]), sign)]
    if is_call(node, aten.masked_fill) and (constant(program, node.args[2]) or 0) <= DENYING:
        r.allowed.append((as_node(node.args[1]), True))
        return [(as_node(node.args[0]), 1.0)]
    if is_call(node, aten.where):
        for index, denied in ((1, True), (2, False)):
            kept = node.args[3 - index]
            if (constant(program, node.args[index]) or 0) <= DENYING and isinstance(kept, fx.Node):
                r.allowed.append((as_node(node.args[0]), denied))
                return [(kept, 1.0)]
    return []


def split_mask(program: Program, query: fx.Node, mask: fx.Node, before: fx.Node) -> tuple[Any, Any]:
    """An additive mask of SDPA as (mask, bias) of an `attention_site`, new nodes ahead of `before`."""
    if mask.meta["val"].dtype == torch.bool or not _effects(program, mask)[1]:
        return mask, None
    reading = Reading(query, query, query, before, terms=[(mask, 1.0)])
    with program.graph.inserting_before(before):
        return split(program, reading, before)
