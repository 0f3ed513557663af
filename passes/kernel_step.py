"""The program with the kernels themselves inside, for one kind of step: a package that needs none of our ops.

    ``lethe::attention(q, k, v, *pools, table, …)``  =>  ``lethe::decode_attention`` or ``lethe::prefill_attention``
    ``lethe::linears(x, weights, biases)``           =>  ``lethe::few_linears`` where tokens are few, else linear maps
    pools that layers share                          =>  pages of each cache, written in place by one layer's kernels

Each cache has as many pages a row as every other, one row after the other: one page table serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.contiguous import DECOMPOSED, PagedBuilder, refuse_what_has_no_contiguous_form
from lethe_compile.passes.fuse_projections import LINEARS
from lethe_compile.passes.program import Program, Site

CACHE = ("k", "v", "position", "mass", "length")
"""Tensors of cache i, as ``k_i``: ``[pages, kv_heads, page, dim]`` twice, ``[pages, page]`` twice, ``[rows]``."""
MOST_ROWS = 64
"""Rows that a decode step takes at most, unless told otherwise: its kernels are compiled for no more."""


def kernel_step(program: Program, *, decode: bool, most_rows: int = MOST_ROWS) -> fx.GraphModule:
    """``(input_ids, positions, new_lengths, page_table, *caches) -> (logits,)``; caches are written in place.

    With `decode` ids are ``[rows, 1]``, of at most `most_rows`; else ``[rows, T]``, of any. The table is ``[rows, n]``.
    Values that a cache keeps inside its keys have no tensor. Logits are as those of `contiguous_step`.

    Raises:
        UnsupportedGraphError: as `refuse_what_has_no_contiguous_form`.
    """
    from lethe_compile.kernels import exported  # registers the ops; needs Triton

    refuse_what_has_no_contiguous_form(program)
    return _KernelBuilder(program, decode, exported, 1 << (most_rows - 1).bit_length()).build()


def cache_names(program: Program) -> list[str]:
    """Names of the caches' tensors, as inputs."""
    return [
        f"{kind}_{index}"
        for index, site in enumerate(program.caches)
        for kind in CACHE
        if kind != "v" or not site.latent
    ]


class _KernelBuilder(PagedBuilder):
    def __init__(self, program: Program, decode: bool, ops: Any, most_rows: int) -> None:
        super().__init__(program)
        self.decode, self.ops, self.most_rows = decode, ops, most_rows
        self.counter: fx.Node | None = None

    def _names(self) -> Sequence[str]:
        return ("input_ids", "positions", "new_lengths", "page_table", *cache_names(self.program))

    def _begin(self) -> list[Any]:
        begun = super()._begin()
        if self.decode:  # one for all layers: each leaves it as it was
            from lethe_compile.kernels.decode.triton import fixed_counter

            sizes = [
                fixed_counter(self.most_rows, site.heads, site.geometry[0], site.geometry[2], _itemsize(site))
                for site in self.program.sites
            ]
            options: dict[str, Any] = {"dtype": torch.int32, "device": self.program.device}
            self.counter = self.graph.call_function(torch.zeros, (max(sizes),), options)
        return begun

    def _end(self, caches: list[Any]) -> Any:
        return (super()._end(caches),)

    def _decomposed(self) -> Mapping[str, Callable[..., Tensor]]:
        if not self.decode:
            return DECOMPOSED
        ops, plain, most = self.ops, DECOMPOSED[str(LINEARS)], self.most_rows

        def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
            if not ops.linears_serve(x, weights, most):
                return plain(x, weights, biases)
            result: Tensor = torch.ops.lethe.few_linears(x, list(weights), list(biases), most)
            return result

        return {**DECOMPOSED, str(LINEARS): linears}

    def _attention(self, site: Site, caches: list[Any]) -> None:
        arguments: Any = site.node.args
        new = (self._value(node) for node in arguments[:3])
        k, v, position, mass, length = (self.given.get(f"{kind}_{site.cache}") for kind in CACHE)
        steps = (self._value(node) for node in arguments[9:11])
        counter = (self.counter,) if self.decode else ()
        learned = (node if node is None else self._value(node) for node in arguments[11:13])
        rule = (*arguments[13:17], *arguments[18:21])  # scale, window, chunked, softcap; decay, peak, shares
        table = self.given["page_table"]
        operands = (*new, k, v, position, mass, table, length, *steps, *counter, *learned, *rule)
        name = "decode_attention" if self.decode else "prefill_attention"
        most = (self.most_rows,) if self.decode else ()
        op = getattr(torch.ops.lethe, name).default
        self.values[site.node] = self.graph.call_function(op, (*operands, *most))


def _itemsize(site: Site) -> int:
    value: Tensor = site.node.meta["val"]
    return value.dtype.itemsize
