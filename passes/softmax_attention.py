"""Attention written out: from a softmax over tokens back to the product of queries and keys, forward to the values.

What lies between is read as one formula, ``softmax(cap(scale * q·k) + bias + mask) · v``, by walking over elementwise
and view operators. Reading is not proof: the formula found is run beside the sub-graph on random operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.evaluate import evaluate, sample_inputs
from lethe_compile.passes.mask_terms import split
from lethe_compile.passes.program import (
    SITE_OP,
    Program,
    ancestors,
    argument,
    is_call,
    is_symbolic,
    operand,
    same_sizes,
    shape_of,
)
from lethe_compile.passes.reading import DENYING, NotAttention, Reading, as_node, at_rank_4, call, constant, sizes_of

aten = torch.ops.aten

_PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.einsum)
_SAME = (aten.to, aten.type_as, aten._to_copy, aten.contiguous, aten.clone, aten.dropout)
_VIEWS = (aten.reshape, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze)
_ROWS, _TOKENS, _PADDING = 3, (13, 6), 2  # of the sequences on which a reading is proved


def locate(program: Program, softmax: fx.Node, layer: int) -> fx.Node:
    """Replace the attention around `softmax` by an `attention_site` and return that.

    Raises:
        NotAttention: it is no attention, or of a form that the site cannot hold.
    """
    reading = read(program, softmax)
    before = reading.output
    operands = [at_rank_4(program, node, before) for node in (reading.query, reading.key, reading.value)]
    dtype = operands[2].meta["val"].dtype
    with program.graph.inserting_before(before):
        for index in (0, 1):  # a model may multiply in float32: the op does so by itself
            if operands[index].meta["val"].dtype != dtype:
                operands[index] = call(aten.to.dtype, (operands[index], dtype), program)
        mask, bias = split(program, reading, before)
        options = (reading.scale, reading.softcap, None, layer)
        site = call(SITE_OP, (*operands, mask, None, bias, *options), program)
        site.meta.update({k: v for k, v in softmax.meta.items() if k in ("nn_module_stack", "stack_trace")})
        out = site if reading.order is None else call(aten.permute.default, (site, list(reading.order)), program)
        if not same_sizes(shape_of(out), shape_of(before)):
            out = call(aten.reshape.default, (out, sizes_of(program, shape_of(before))), program)
        if out.meta["val"].dtype != before.meta["val"].dtype:
            out = call(aten.to.dtype, (out, before.meta["val"].dtype), program)
    _prove(program, reading, out)
    before.replace_all_uses_with(out)
    return site


# ------------------------------------------------------------------------------------------------------------- reading


def read(program: Program, softmax: fx.Node) -> Reading:
    """The formula around a softmax over tokens."""
    if argument(softmax, 1, "dim") not in (-1, len(shape_of(softmax)) - 1):
        raise NotAttention("its softmax is not over the last dimension")
    chain = _chain(softmax.args[0], set())
    if chain is None:
        raise NotAttention("its scores come from no product of queries and keys")
    query, key, factor, added = _product(program, chain[-1])
    value, output, order = _consumer(program, softmax)
    reading = Reading(query, key, value, output, scale=factor, terms=added, order=order)
    for inner, node in zip(chain[:0:-1], chain[-2::-1], strict=True):
        _apply(program, reading, node, inner)
    if reading.tanh:
        raise NotAttention("a tanh of its scores is not scaled: no softcap")
    return reading


def _chain(node: Any, seen: set[fx.Node]) -> list[fx.Node] | None:
    """Nodes from the softmax's operand down to the product, through operators that `_apply` reads; None if none is."""
    if not isinstance(node, fx.Node) or node in seen:
        return None
    seen.add(node)
    if is_call(node, *_PRODUCTS):
        return [node]
    elementwise = (aten.mul, aten.div, aten.div_, aten.add, aten.sub, aten.tanh, aten.where, aten.masked_fill)
    if not is_call(node, *elementwise, aten.maximum, aten.max, aten.clamp, aten.clamp_min, *_SAME, *_VIEWS):
        return None
    found = [chain for chain in (_chain(n, seen) for n in node.all_input_nodes) if chain is not None]
    if len(found) > 1:
        raise NotAttention(f"two products meet in its scores, at '{node.name}'")
    return [node, *found[0]] if found else None


def _apply(program: Program, r: Reading, node: fx.Node, inner: fx.Node) -> None:
    """Read one operator between the product and the softmax; `inner` is the operand that carries the scores."""
    others = [a for a in node.args if a is not inner]
    if is_call(node, *_SAME, *_VIEWS):
        return
    if is_call(node, aten.tanh):
        if r.terms or r.allowed or r.softcap is not None:
            raise NotAttention("its scores are capped after something was added to them")
        r.tanh = True
    elif is_call(node, aten.mul, aten.div, aten.div_):
        _apply_factor(program, r, node, others)
    elif is_call(node, aten.add, aten.sub):
        _apply_term(program, r, node, inner, others)
    elif is_call(node, aten.where):
        cond, when_true, when_false = node.args
        denied = when_true is not inner
        _expect_denying(program, node, when_true if denied else when_false)
        r.allowed.append((as_node(cond), denied))
    elif is_call(node, aten.masked_fill):
        _expect_denying(program, node, node.args[2])
        r.allowed.append((as_node(node.args[1]), True))
    else:  # maximum, clamp: from below, where nothing but what is denied lies
        low = argument(node, 1, "min")
        if argument(node, 2, "max") is not None:
            raise NotAttention(f"its scores are clamped from above at '{node.name}'")
        _expect_denying(program, node, low)


def _apply_factor(program: Program, r: Reading, node: fx.Node, others: list[Any]) -> None:
    factor = constant(program, others[0])
    if factor is None:
        if is_call(node, aten.mul) and _is_gate(program, others[0]):
            return  # scores times zeros and ones, where a term denies what became zero: the proof tells
        raise NotAttention(f"its scores are scaled by what is no constant, at '{node.name}'")
    if not is_call(node, aten.mul):
        factor = 1.0 / factor
    if r.tanh:
        r.tanh, r.softcap, r.scale = False, factor, r.scale * factor
    elif r.softcap is not None:
        raise NotAttention("its scores are scaled after they were capped")
    else:
        r.scale *= factor
        r.terms = [(term, f * factor) for term, f in r.terms]


def _apply_term(program: Program, r: Reading, node: fx.Node, inner: fx.Node, others: list[Any]) -> None:
    sign = float(argument(node, 2, "alpha", 1)) * (-1.0 if is_call(node, aten.sub) else 1.0)
    if r.tanh:
        raise NotAttention("something is added inside the softcap of its scores")
    if is_call(node, aten.sub) and node.args[0] is not inner:
        raise NotAttention("its scores are subtracted")
    term = others[0]
    if constant(program, term) is not None:
        return  # the same for every key: a softmax does not see it
    if is_call(node, aten.sub) and _is_maximum(term, inner):
        return
    r.terms.append((as_node(term), sign))


def _is_maximum(term: Any, scores: fx.Node) -> bool:
    """``scores.amax(-1, keepdim=True)``, which keeps exponentials small and changes nothing."""
    source = term.args[0] if isinstance(term, fx.Node) and "getitem" in str(term.target) else term
    return is_call(source, aten.amax, aten.max) and operand(source) is scores


def _is_gate(program: Program, node: Any) -> bool:
    if not isinstance(node, fx.Node) or any(is_call(n, *_PRODUCTS) for n in ancestors(node)):
        return False
    value = evaluate(program.module, node, sample_inputs(_TOKENS[0], device=program.device))
    return isinstance(value, Tensor) and bool(((value == 0) | (value == 1)).all())


def _expect_denying(program: Program, node: fx.Node, fill: Any) -> None:
    value = constant(program, fill)
    if value is None or value > DENYING:
        raise NotAttention(f"scores are replaced by {fill} at '{node.name}', which does not deny them")


# ------------------------------------------------------------------------------------------------ products and operands


def _product(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node, float, list[tuple[fx.Node, float]]]:
    """(query [..., T, D], key [..., S, D], factor, added terms) of the node that multiplies them."""
    if is_call(node, aten.einsum):
        query, key = _einsum_operands(program, node)
        return query, key, 1.0, []
    added: list[tuple[fx.Node, float]] = []
    factor, first = 1.0, 0
    if is_call(node, aten.baddbmm):
        first, factor = 1, float(argument(node, 4, "alpha", 1))  # of the arguments; of the product
        added = [(as_node(node.args[0]), float(argument(node, 3, "beta", 1)))]
    return as_node(node.args[first]), _transposed(program, as_node(node.args[first + 1]), node), factor, added


def _transposed(program: Program, node: fx.Node, before: fx.Node) -> fx.Node:
    """[..., S, D] of keys [..., D, S]: what they were transposed from, where they were."""
    rank = len(shape_of(node))
    last = [*range(rank - 2), rank - 1, rank - 2]
    turned = is_call(node, aten.mT)
    if is_call(node, aten.transpose):
        turned = {int(dim) % rank for dim in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[arg-type]
    elif is_call(node, aten.permute):
        turned = [int(dim) % rank for dim in node.args[1]] == last  # type: ignore[union-attr, arg-type]
    if turned:
        return as_node(operand(node))
    with program.graph.inserting_before(before):
        return call(aten.transpose.int, (node, -1, -2), program)


def _einsum_operands(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Both operands of ``einsum("bhqd,bhkd->bhqk")``, whatever its letters and their order."""
    equation, tensors = str(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    left, _, result = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    if len(letters) != 2 or "." in left or len(result) != 4:
        raise NotAttention(f"its scores are einsum('{equation}')")
    q, k = result[2], result[3]
    if q not in letters[0] or k not in letters[1]:
        letters, tensors = letters[::-1], tensors[::-1]
    (contracted,) = set(letters[0]) & set(letters[1]) - set(result)
    found = []
    with program.graph.inserting_before(node):
        for tensor, own, token in zip(tensors, letters, (q, k), strict=True):
            order = [own.index(letter) for letter in result[:2] + token + contracted]
            found.append(call(aten.permute.default, (tensor, order), program))
    return found[0], found[1]


def _consumer(program: Program, softmax: fx.Node) -> tuple[fx.Node, fx.Node, tuple[int, ...] | None]:
    """(value [..., S, Dv], output [..., T, Dv], its order): what the probabilities are multiplied with."""
    node = softmax
    while True:
        users = [u for u in node.users if _leads_on(u)]
        if len(users) != 1:
            raise NotAttention(f"its probabilities have {len(users)} uses, at '{node.name}'")
        (user,) = users
        if is_call(user, aten.matmul, aten.bmm) and user.args[0] is node:
            return as_node(user.args[1]), user, None
        if is_call(user, aten.einsum):
            value, order = _einsum_value(program, user, node)
            return value, user, order
        if not is_call(user, *_SAME, *_VIEWS):
            raise NotAttention(f"its probabilities go through '{user.name}' ({user.target})")
        node = user


def _einsum_value(program: Program, node: fx.Node, weights: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """The values of ``einsum("bhqk,bhkd->bhqd")``, and the order of the result's dimensions."""
    equation, tensors = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    left, _, result = equation.partition("->")
    letters = left.split(",")
    made = set(result) - set(letters[0])  # the values' own dimension
    if len(letters) != 2 or tensors[0] is not weights or len(result) != 4 or len(made) != 1 or "." in left:
        raise NotAttention(f"its probabilities go through einsum('{equation}')")
    (dim,) = made
    order = [letters[1].index(letter) for letter in (*letters[0][:2], letters[0][3], dim)]
    with program.graph.inserting_before(node):
        value = call(aten.permute.default, (tensors[1], order), program)
    return value, tuple((letters[0][:3] + dim).index(letter) for letter in result)


def _leads_on(node: fx.Node) -> bool:
    """Whether anything that counts comes of a node: attention weights that nobody reads do not."""
    return node.op == "output" or bool(node.users) or is_call(node, aten.matmul, aten.bmm)


# ------------------------------------------------------------------------------------------------------ mask and bias


# ------------------------------------------------------------------------------------------------------------- a proof


def _prove(program: Program, r: Reading, site: fx.Node) -> None:
    """Run the reading and the sub-graph it was read from on the same random operands, at two lengths."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for tokens in _TOKENS:
        inputs = sample_inputs(tokens, padding=_PADDING, device=program.device)
        batch, length = shape_of(program.input_ids)
        concrete = {batch.node.expr: _ROWS, length.node.expr: tokens}
        bound = {}
        for node in _sources(r):
            shape = [_concrete(size, concrete) for size in shape_of(node)]
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            bound[node] = value.to(program.device, node.meta["val"].dtype)
        want, have = (evaluate(program.module, node, inputs, bound=bound) for node in (r.output, site))
        if r.order is not None:
            canonical = [r.order.index(dim) for dim in range(4)]
            want, have = want.permute(canonical), have.permute(canonical)
        error = _relative(have, want, inputs["attention_mask"])
        if not error < (1e-4 if want.dtype == torch.float32 else 3e-2):
            raise NotAttention(f"read as attention it computes something else: off by {error:.1e} (relative)")


def _sources(r: Reading) -> list[fx.Node]:
    """What the sub-graph's products read; the operands of the site are views of these."""
    moved = (aten.transpose, aten.permute)
    return [node.args[0] if is_call(node, *moved) else node for node in (r.query, r.key, r.value)]  # type: ignore[misc]


def _concrete(size: Any, sizes: dict[Any, int]) -> int:
    if not is_symbolic(size):
        return int(size)
    return int(size.node.expr.subs(sizes))


def _relative(have: Tensor, want: Tensor, padding: Tensor) -> float:
    """Over real queries; sequences may be rows of their own or rows times heads."""
    tokens = want.shape[-2]
    real = padding.bool().repeat_interleave(want.shape[0] // padding.shape[0], 0)
    real = real.view(want.shape[0], *[1] * (want.dim() - 3), tokens, 1)
    have, want = (x.double().masked_fill(~real, 0) for x in (have, want))  # padding may be NaN
    return float((have - want).norm() / want.norm())
