"""What relates tokens to tokens: masks, and what models make of their tokens to get them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lethe_compile.passes.axes import Axes, token_dims
from lethe_compile.passes.classify_masks import prove
from lethe_compile.passes.evaluate import evaluate, sample_inputs
from lethe_compile.passes.mask_constants import NotABand
from lethe_compile.passes.program import (
    SHAPE_ONLY,
    SITE_OP,
    Mask,
    Program,
    ancestors,
    is_call,
    is_symbolic,
    same_size,
    shape_of,
)
from lethe_compile.passes.rewrite_positions import counts_tokens

aten = torch.ops.aten

_SAMPLE = 13  # tokens on which it is seen what a mask's values mean


class Relations:
    """What in a program depends on the tokens themselves, what relates them to each other, and which of it are bands.

    Attributes:
        content: nodes whose values depend on the token ids, and not on their number alone.
        relating: nodes that relate tokens to tokens, and what is made of them.
        axes: which of their dimensions count queries, and which keys.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.content, self.relating = program, _content(program), _relating(program)
        self._bands: dict[fx.Node, Mask | None] = {}
        self.axes = Axes(program, self.is_leaf)

    def is_leaf(self, node: fx.Node) -> bool:
        """Whether a value is taken as it is: what a token has of its own, a size of the input, a band."""
        if node.op != "call_function" or is_call(node, aten.sym_size) or counts(node, self.program):
            return True
        if isinstance(node.meta["val"], torch.SymInt):
            return False
        if node in self.relating:
            return self.band(node) is not None
        rows = shape_of(self.program.input_ids)[0]
        return node in self.content or all(same_size(s, rows) for s in shape_of(node) if is_symbolic(s))

    def band(self, node: fx.Node) -> Mask | None:
        """The band that a mask is, proved, if it depends on positions alone and is one."""
        if node not in self._bands:
            rank = len(shape_of(node))
            fits = rank > 1 and token_dims(node, self.program) == [rank - 2, rank - 1]
            alone = fits and self.content.isdisjoint(ancestors(node, stop=(aten.sym_size,)))
            self._bands[node] = self._prove(node) if alone else None
        return self._bands[node]

    def bands_in(self, nodes: Sequence[fx.Node]) -> set[Mask]:
        """The bands that values are made of."""
        found, seen, stack = set(), set[fx.Node](), list(nodes)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                if node in self.relating and (band := self.band(node)) is not None:
                    found.add(band)
                stack.extend([] if self.is_leaf(node) else node.all_input_nodes)
        return found

    def _prove(self, node: fx.Node) -> Mask | None:
        allows = node
        with self.program.graph.inserting_after(node):
            if denies(self.program, node):
                allows = self.program.graph.call_function(aten.logical_not.default, (node,))
        try:
            return prove(self.program, allows)
        except NotABand:
            return None
        finally:
            if allows is not node:
                self.program.graph.erase_node(allows)


def _content(program: Program) -> set[fx.Node]:
    """Nodes whose values depend on the token ids, and not on their number alone."""
    found = {program.input_ids}
    for node in program.graph.nodes:
        if not is_call(node, *SHAPE_ONLY) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _relating(program: Program) -> set[fx.Node]:
    """Nodes that relate tokens to tokens, and what is made of them; what attention gives belongs to one token again."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        follows = any(n in found for n in node.all_input_nodes) and not is_call(node, SITE_OP, *SHAPE_ONLY)
        if follows or len(token_dims(node, program)) > 1:
            found.add(node)
    return found


def counts(node: fx.Node, program: Program) -> bool:
    """Whether a node counts the tokens of the input, from any number on."""
    return is_call(node, aten.arange) and counts_tokens(node, program, {})


def sampled(program: Program, node: fx.Node) -> Tensor:
    """The value of a mask on a sample without padding."""
    value: Tensor = evaluate(program.module, node, sample_inputs(_SAMPLE, device=program.device))
    return value


def denies(program: Program, node: fx.Node) -> bool:
    """Whether a boolean mask says what is hidden, as the last token is from the first query."""
    return node.meta["val"].dtype == torch.bool and bool(sampled(program, node)[..., 0, -1].all())
