"""Which tensors of each token a node is a linear map of, and that map: found by walking back, proved by running.

The walk goes back through calls that arrange numbers, products with constants, and sums, and settles on the narrowest
tensors that determine the node. What the calls mean is not read from them: unit vectors are passed through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, prod
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.evaluate import evaluate
from lethe_compile.passes.program import SHAPE_ONLY, Program, is_call, is_symbolic, same_size, shape_of
from lethe_compile.passes.reading import call, sizes_of

aten = torch.ops.aten

_LAYOUT = (
    *(aten.reshape, aten.view, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze),
    *(aten.transpose, aten.permute, aten.movedim, aten.t, aten.expand, aten.repeat, aten.repeat_interleave),
    *(aten.contiguous, aten.clone, aten.slice, aten.select, aten.narrow, aten.split, aten.split_with_sizes),
    *(aten.chunk, aten.unbind, aten.cat, aten.stack, aten.slice_scatter, getitem),
)
_PRODUCTS = (aten.linear, aten.matmul, aten.mm, aten.bmm, aten.einsum, aten.mul)
_SUMS = (aten.add, aten.sub, aten.neg)
_DEEPEST = 32  # calls from a node to what it is made of
_EXACT = 1e-9  # relative, in float64


class NotLinear(Exception):
    """What is no linear map of something narrower; the message says why, `numbers` how many a token it would take."""

    def __init__(self, reason: str, numbers: int | None = None) -> None:
        super().__init__(reason)
        self.numbers = numbers


@dataclass(frozen=True)
class Source:
    """A tensor of `width` numbers a token: rows first, tokens at `dim`, the rest static."""

    node: fx.Node
    dim: int
    width: int

    def flattened(self, program: Program) -> fx.Node:
        """A new node ``[B, T, width]``."""
        shape = shape_of(self.node)
        node = self.node
        if any(size != 1 for size in shape[1 : self.dim]):
            order = [0, self.dim, *(d for d in range(1, len(shape)) if d != self.dim)]
            node = call(aten.permute.default, (node, order), program)
        elif len(shape) == 3:
            return node
        sizes = sizes_of(program, (shape[0], shape[self.dim]))
        return call(aten.reshape.default, (node, [*sizes, self.width]), program)

    def shaped(self, flat: Tensor) -> Tensor:
        """Values [B, T, width] as they stand in the tensor."""
        rest = [size for d, size in enumerate(shape_of(self.node)) if d not in (0, self.dim)]
        return flat.reshape(*flat.shape[:2], *rest).movedim(1, self.dim)


class Linears:
    """Linear maps in the graph of `program`, which stays as it is."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._rows, self._tokens = shape_of(program.input_ids)
        self._known: dict[tuple[fx.Node, int], tuple[fx.Node, ...]] = {}
        self._constant: set[fx.Node] = set()
        for node in program.graph.nodes:
            made = node.op == "get_attr" or (node.op == "call_function" and not is_call(node, *SHAPE_ONLY))
            if made and isinstance(node.meta.get("val"), Tensor) and self._constant.issuperset(node.all_input_nodes):
                self._constant.add(node)

    def sources(self, node: fx.Node) -> tuple[Source, ...] | None:
        """The narrowest tensors of each token, as far as the walk finds them, that `node` is made of; or None."""
        nodes = self._cut(node, _DEEPEST)
        dims = [self._token_dim(n) for n in nodes]
        if None in dims:
            return None
        return tuple(Source(n, d, int(self._width(n))) for n, d in zip(nodes, dims, strict=True) if d is not None)

    def map_of(self, node: fx.Node, sources: Sequence[Source]) -> Tensor:
        """The map from `sources`, side by side, to `node` [B, heads, T, dim]: float64 [heads, dim, Σ width].

        Raises:
            NotLinear: it has a constant term, or `node` is something else than that map of each token alone.
        """
        width = sum(source.width for source in sources)
        device = self._program.device
        unit = torch.eye(width + 1, width, dtype=torch.float64, device=device)  # and, last, zero
        images = self._run(node, sources, unit[:, None])[:, :, 0]  # [width + 1, heads, dim]
        if images[-1].any():
            raise NotLinear(f"'{node.name}' has a constant term, as a bias gives", width)
        matrix: Tensor = images[:-1].permute(1, 2, 0)
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(2, 3, width, dtype=torch.float64, generator=generator).to(device)
        actual, expected = self._run(node, sources, sample), torch.einsum("hdw,btw->bhtd", matrix, sample)
        if actual.shape != expected.shape or not (actual - expected).norm() <= _EXACT * expected.norm():
            raise NotLinear(f"'{node.name}' is not computed from each token alone", width)
        return matrix

    def weight_of(self, node: fx.Node, matrix: Tensor) -> tuple[fx.Node, int] | None:
        """A weight on the way to `node` of which [heads, dim, width] is a part, and its first row in each head."""
        heads, dim, width = matrix.shape
        for weight in self._operands_on_the_way(node):
            shape = shape_of(weight)
            if weight.op != "get_attr" or len(shape) != 2 or shape[1] != width or shape[0] % heads:
                continue
            rows = self._value(weight).view(heads, -1, width)
            for first in (rows[0] == matrix[0, 0]).all(-1).nonzero().flatten().tolist():
                if torch.equal(rows[:, first : first + dim], matrix):
                    return weight, first
        return None

    # ------------------------------------------------------------------------------------------------------- the walk

    def _cut(self, node: fx.Node, left: int) -> tuple[fx.Node, ...]:
        if (node, left) not in self._known:
            self._known[node, left] = self._narrowest(node, left)
        return self._known[node, left]

    def _narrowest(self, node: fx.Node, left: int) -> tuple[fx.Node, ...]:
        operands = self._varying(node) if left else []
        if not operands:
            return (node,)
        behind = tuple(dict.fromkeys(n for operand in operands for n in self._cut(operand, left - 1)))
        width, own = sum(map(self._width, behind)), self._width(node)
        # Through one that only arranges what it is given as well: what two nodes have in common lies behind it.
        arranges = is_call(node, *_LAYOUT) and len(behind) == 1
        return behind if width < own or (width == own and arranges) else (node,)

    def _varying(self, node: fx.Node) -> list[fx.Node]:
        """The operands that a node is a linear map of; none if it is no such map."""
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, list, tuple))]
        varying = [n for n in tensors if n not in self._constant and not is_call(n, *SHAPE_ONLY)]
        if is_call(node, *_LAYOUT):
            return varying
        if is_call(node, *_PRODUCTS) and len(varying) == 1:
            return varying if not is_call(node, aten.linear) or node.args[0] is varying[0] else []
        return varying if is_call(node, *_SUMS) and len(varying) == len(tensors) else []

    def _token_dim(self, node: fx.Node) -> int | None:
        shape = shape_of(node)
        dims = [d for d, size in enumerate(shape) if is_symbolic(size)]
        if len(dims) != 2 or dims[0] != 0 or not same_size(shape[0], self._rows):
            return None
        return dims[1] if same_size(shape[dims[1]], self._tokens) else None

    def _width(self, node: fx.Node) -> float:
        """Numbers a token; infinite for what is not one tensor of each token."""
        if self._token_dim(node) is None:
            return inf
        return float(prod(int(size) for size in shape_of(node) if not is_symbolic(size)))

    def _way(self, node: fx.Node, ends: Iterable[fx.Node]) -> list[fx.Node]:
        """The calls between `ends` and `node`, `node` first."""
        found, stack, stop = dict[fx.Node, None](), [node], set(ends)
        while stack:
            current = stack.pop()
            if current not in stop and current not in found:
                found[current] = None
                stack.extend(self._varying(current))
        return list(found)

    def _operands_on_the_way(self, node: fx.Node) -> list[fx.Node]:
        way = self._way(node, self._cut(node, _DEEPEST))
        return list(dict.fromkeys(n for step in way for n in step.all_input_nodes if n in self._constant))

    # -------------------------------------------------------------------------------------------------------- running

    def _run(self, node: fx.Node, sources: Sequence[Source], flat: Tensor) -> Tensor:
        """The value of `node` in float64, where the sources, side by side, are `flat` [B, T, width]."""
        parts = flat.split([source.width for source in sources], dim=-1)
        bound: dict[fx.Node, Any] = {s.node: s.shaped(part) for s, part in zip(sources, parts, strict=True)}
        rows, tokens = flat.shape[:2]
        for step in self._way(node, bound):
            for operand in step.all_input_nodes:
                if operand in self._constant:
                    bound[operand] = self._value(operand)
                elif is_call(operand, *SHAPE_ONLY) and isinstance(operand.meta["val"], Tensor):
                    bound[operand] = flat.new_zeros(self._sizes(operand, rows, tokens))
        given = torch.zeros(rows, tokens, dtype=torch.int64, device=flat.device)
        value: Tensor = evaluate(
            self._program.module, node, {str(p.target): given for p in self._program.placeholders()}, bound=bound
        )
        return value

    def _value(self, constant: fx.Node) -> Tensor:
        value: Tensor = evaluate(self._program.module, constant, {})
        return value.double() if value.is_floating_point() else value

    def _sizes(self, node: fx.Node, rows: int, tokens: int) -> list[int]:
        stand_in = {True: rows, False: tokens}
        for size in shape_of(node):
            if is_symbolic(size) and not same_size(size, self._rows) and not same_size(size, self._tokens):
                raise NotLinear(f"'{node.name}' has a size {size}, neither rows nor tokens")
        return [stand_in[same_size(s, self._rows)] if is_symbolic(s) else int(s) for s in shape_of(node)]
