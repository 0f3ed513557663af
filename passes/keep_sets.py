"""Keep-sets per KV head: around the cached op, each KV head of a sequence is a row of its own.

The kernels stay as they are: to them these are rows' = rows * heads of one KV head each, with lengths, pages,
positions and masses of their own. A decode step copies nothing for it: ``[B, S * G, 1, D]`` is a view as
``[B * S, G, 1, D]``.
"""

from __future__ import annotations

from operator import mul
from typing import Any

import torch
from torch import fx

from lethe_compile.passes.program import Program, Site, shape_of
from lethe_compile.passes.reading import sizes_of

aten = torch.ops.aten


class HeadRows:
    """Makes operands of the cached op over rows ``[B * S]``, S the most KV heads of any layer; row ``b * S + h``.

    ``query [B, Hkv * G, T, D]``  =>  ``[B * S, G, T, D]``, likewise key and value with G = 1; the output back.

    Layers of fewer KV heads are padded: the rows that they lack get no token, and hold none. `positions` and
    `new_lengths` are repeated once a step, for all layers.
    """

    def __init__(self, program: Program, positions: fx.Node, new_lengths: fx.Node) -> None:
        self._program, self._graph = program, program.graph
        self.most = max(site.kv_heads for site in program.sites)
        self._new_lengths, self._lengths = new_lengths, dict[int, fx.Node]()  # by KV heads
        self._rows: dict[tuple[fx.Node, int], fx.Node] = {}
        with self._graph.inserting_before(program.placeholders()[-1].next):
            batch, tokens = sizes_of(program, shape_of(program.input_ids))
            self._sizes = batch, tokens, self._call(mul, batch, self.most)
            each = self._call(aten.unsqueeze.default, positions, 1)
            each = self._call(aten.expand.default, each, [-1, self.most, -1])
            self.positions = self._call(aten.reshape.default, each, [self._sizes[2], tokens])
            for heads in sorted({site.kv_heads for site in program.sites}):
                self._lengths[heads] = self._repeated(heads)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self._graph.call_function(target, args)

    def _repeated(self, heads: int) -> fx.Node:
        """``[B * S]`` int32 new tokens of each row; none in rows beyond a layer's `heads`."""
        each = self._call(aten.unsqueeze.default, self._new_lengths, 1)
        each = self._call(aten.expand.default, each, [-1, heads])
        if heads < self.most:
            each = self._call(aten.constant_pad_nd.default, each, [0, self.most - heads])
        return self._call(aten.reshape.default, each, [self._sizes[2]])

    def new_lengths(self, site: Site) -> fx.Node:
        """How many tokens each row of a site gets."""
        return self._lengths[site.kv_heads]

    def rows(self, site: Site, operand: fx.Node) -> fx.Node:
        """Query, key or value of a site, ``[B, n * Hkv, T, D]``, as ``[B * S, n, T, D]``; made once each."""
        if (operand, site.kv_heads) not in self._rows:
            heads, dim = shape_of(operand)[1], shape_of(operand)[3]
            each = heads // site.kv_heads
            spare = (self.most - site.kv_heads) * each
            padded = self._call(aten.constant_pad_nd.default, operand, [0, 0, 0, 0, 0, spare]) if spare else operand
            shape = [self._sizes[2], each, self._sizes[1], dim]
            self._rows[operand, site.kv_heads] = self._call(aten.reshape.default, padded, shape)
        return self._rows[operand, site.kv_heads]

    def learned(self, site: Site, operand: fx.Node | None) -> fx.Node | None:
        """Sinks or slopes ``[heads]`` as the kernels take them, ``[S * G]``."""
        spare = (self.most - site.kv_heads) * (site.heads // site.kv_heads)
        if operand is None or not spare:
            return operand
        return self._call(aten.constant_pad_nd.default, operand, [0, spare])

    def back(self, site: Site, output: fx.Node) -> fx.Node:
        """The op's output ``[B * S, G, T, D]`` as the site's, ``[B, heads, T, D]``."""
        batch, tokens, _ = self._sizes
        padded = site.heads // site.kv_heads * self.most
        whole = self._call(aten.reshape.default, output, [batch, padded, tokens, site.v_dim])
        return whole if padded == site.heads else self._call(aten.slice.Tensor, whole, 1, 0, site.heads)
