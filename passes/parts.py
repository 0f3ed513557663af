"""The parts of a rank in the graph: of weights, stored alone, and of values, cut out of the whole or gathered to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed._functional_collectives
from torch import Tensor, fx, nn

from lethe_compile.passes.check import fake_mode_of
from lethe_compile.passes.placement import Placement
from lethe_compile.passes.program import Program, attribute, is_call, shape_of
from lethe_compile.passes.reading import call, sizes_of
from lethe_compile.passes.split_plan import Product

aten = torch.ops.aten
collective = torch.ops._c10d_functional

Fetch = Callable[[str, Tensor, Placement, int], Tensor]
"""(name of a weight, the weight, how it is held, rank) -> the rank's part, a tensor of its own.

A function of one's own is asked for every weight, also those of which every rank holds all."""


def fetch_part(name: str, weight: Tensor, placement: Placement, rank: int) -> Tensor:
    """A rank's part of a weight that lies in memory as a whole."""
    return placement.cut(weight.detach(), rank).clone()


class Share(Protocol):
    """Whose part a program is cut to: `rank` of `ranks`, which talk in `group`; see `TensorParallel`."""

    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def group(self) -> str: ...
    @property
    def fetch(self) -> Fetch: ...


class Parts:
    """Makes nodes of what one rank holds; each part of a value once.

    Attributes:
        split: names of the weights of which something is cut.
    """

    def __init__(self, options: Share, program: Program) -> None:
        self._options, self._program, self._graph = options, program, program.graph
        self._rank, self._ranks = options.rank, options.ranks
        self._cut: dict[tuple[fx.Node, tuple[int, int, int]], fx.Node] = {}
        self._count = itertools.count()
        self.split: set[str] = set()

    def fetch_whole(self) -> None:
        """Weights that stay whole, where the model itself has none: from `fetch` too."""
        if self._options.fetch is fetch_part:
            return
        module = self._program.module
        for node in list(self._graph.find_nodes(op="get_attr")):
            weight = attribute(module, str(node.target))
            if node.users and isinstance(weight, nn.Parameter) and weight.dim():
                whole = Placement.blocks(0, weight.shape[0], self._ranks, parts=1)
                part = self._options.fetch(str(node.target), weight, whole, self._rank)
                stored = f"tp_whole_{str(node.target).replace('.', '_')}"
                module.register_buffer(stored, part, persistent=False)
                node.target = stored

    def weight(self, product: Product, placement: Placement) -> fx.Node:
        """A rank's part of a product's weight, turned as the product takes it."""
        part = self.part(product.weight, placement)
        if not product.turned:
            return part
        key = (part, (-1, -1, -1))
        if key not in self._cut:
            with self._graph.inserting_after(part):
                self._cut[key] = call(aten.transpose.int, (part, -2, -1), self._program)
        return self._cut[key]

    def part(self, node: fx.Node, placement: Placement) -> fx.Node:
        """A rank's part of a value that it has as a whole: of a weight, stored alone; else cut out when it is made."""
        key = (node, placement.key)
        if key not in self._cut:
            self._cut[key] = self._stored(node, placement) if node.op == "get_attr" else self._sliced(node, placement)
        return self._cut[key]

    def _stored(self, node: fx.Node, placement: Placement) -> fx.Node:
        module, name = self._program.module, str(node.target)
        weight = attribute(module, name)
        # Of a table that stays in use as a whole, as a tied embedding, the rows are no second copy.
        tied = placement.dim == 0 and any(is_call(user, aten.embedding) for user in node.users)
        tied = tied and self._options.fetch is fetch_part
        own = placement.of(self._rank)
        if tied and isinstance(own, tuple):
            part = weight.detach().narrow(0, own[0], own[1] - own[0])
        else:
            part = self._options.fetch(name, weight, placement, self._rank)
        stored = f"tp_{next(self._count)}_{name.replace('.', '_')}"
        module.register_buffer(stored, part, persistent=False)
        self.split.add(name)
        with self._graph.inserting_after(node):
            made = self._graph.get_attr(stored)
        with fake_mode_of(self._program) as mode:
            made.meta["val"] = mode.from_tensor(part, static_shapes=True)
        return made

    def _sliced(self, node: fx.Node, placement: Placement) -> fx.Node:
        own = placement.of(self._rank)
        with self._graph.inserting_after(node):
            if isinstance(own, tuple):
                return call(aten.slice.Tensor, (node, placement.dim, *own), self._program)
            index = self.index(own)
        with self._graph.inserting_after(node):
            return call(aten.index_select.default, (node, placement.dim, index), self._program)

    def index(self, values: Tensor) -> fx.Node:
        """Indices as a buffer of the graph."""
        name = f"tp_index_{next(self._count)}"
        values = values.to(self._program.device)
        self._program.module.register_buffer(name, values, persistent=False)
        with self._graph.inserting_before(next(iter(self._graph.nodes))):
            node = self._graph.get_attr(name)
        with fake_mode_of(self._program) as mode:
            node.meta["val"] = mode.from_tensor(values, static_shapes=True)
        return node

    def all_gather(self, node: fx.Node, held: Placement) -> fx.Node:
        """The whole of a value that ranks hold as `held`."""
        shape, ranks = list(shape_of(node)), self._ranks
        program, after = self._program, node.next
        with self._graph.inserting_before(after):
            dense = call(aten.contiguous.default, (node,), program)
            parts = call(collective.all_gather_into_tensor.default, (dense, ranks, self._options.group), program)
            parts = call(collective.wait_tensor.default, (parts,), program)  # [ranks * first, …]
            parts = call(aten.reshape.default, (parts, [ranks, *sizes_of(program, tuple(shape))]), program)
            order = [*range(1, held.dim + 1), 0, *range(held.dim + 1, len(shape) + 1)]
            parts = call(aten.permute.default, (parts, order), program)
            shape[held.dim] = held.each * ranks
            whole = call(aten.reshape.default, (parts, sizes_of(program, tuple(shape))), program)
            stored = [i for own in held.index for i in own]
            found = {i: place for place, i in reversed(list(enumerate(stored)))}  # the first of those that are alike
            places = [found[i] for i in range(held.size)]
            if places != list(range(len(stored))):
                whole = call(aten.index_select.default, (whole, held.dim, self.index(torch.tensor(places))), program)
        return whole
