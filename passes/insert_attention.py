"""Insert the cached op: every located site becomes `lethe::attention`, and the cache's tensors become inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.base import Note, PassResult, refuse
from lethe_compile.passes.check import fake_mode_of
from lethe_compile.passes.program import (
    CACHED_OP,
    Program,
    Site,
    remove_dead,
    same_size,
    shape_of,
    source_of,
    with_caches,
)
from lethe_compile.passes.reading import sizes_of
from lethe_compile.passes.rewrite_positions import refuse_other_counts

aten = torch.ops.aten

_PAGES, _PAGE, _MAX_PAGES = 8, 16, 4  # example sizes of the cache inputs; the op reads real ones when it runs


@dataclass(frozen=True)
class InsertAttention:
    """Replace uncached attention by the cached op.

    ``attention_site(q, k, v, None, sinks, None, scale, softcap, window, layer)``  =>
    ``attention(q, k, v, k_pages, v_pages, slot_position, slot_mass, page_table, length, positions, new_lengths, …)``

    New inputs: `new_lengths`, for each page pool `k_pages_g`, `v_pages_g`, `slot_position_g`, `slot_mass_g`, and
    `page_table`, `length` for all caches. Layers that attend to the same keys and values under the same mask share a
    cache, to which the first of them appends.

    The input `attention_mask` goes: what still reads it, such as a factor of hidden states, finds every token real, as
    those in the cache are. ``attention_mask  =>  ones([batch, tokens])``

    Conditions: every site's mask is proved; nothing counts the ones; and no matrix of tokens × tokens is left, as it
    would be by an attention that went unrecognised.

    `decay` is RASR's gamma, None tracks no attention mass; `peak` scores by the largest probability instead of the sum.
    """

    decay: float | None = None
    peak: bool = False

    name: ClassVar[str] = "insert-attention"

    def run(self, program: Program) -> PassResult:
        notes = _drop_padding(program)
        for site in program.sites:
            if site.mask is None:
                raise refuse("its mask was not classified", program, site.layer)
        program = replace(program, sites=with_caches(program.sites))
        state = _add_inputs(program)
        sites = []
        for site in program.sites:
            node = _insert(program, site, state, (self.decay, self.peak))
            sites.append(replace(site, node=node))
            owner = f", the cache of layer {program.caches[site.cache].layer}" if site.shares else ""
            notes.append(Note(node.name, f"cached in pool {site.cache_group}{owner}", site.layer))
        remove_dead(program.graph)
        _refuse_token_matrices(program)
        program.module.recompile()
        return PassResult(replace(program, sites=tuple(sites)), tuple(notes))


def _refuse_token_matrices(program: Program) -> None:
    tokens = shape_of(program.input_ids)[1]
    for node in program.graph.nodes:
        shape = shape_of(node)
        if sum(same_size(size, tokens) for size in shape) > 1:
            sizes = ", ".join(map(str, shape))
            raise UnsupportedGraphError(
                f"'{node.name}' [{sizes}] relates every token to every other, outside of any recognised attention",
                node=node.name,
                where=source_of(node) or None,
            )


def _drop_padding(program: Program) -> list[Note]:
    remove_dead(program.graph)
    padding = program.placeholder("attention_mask")
    if padding is None:
        return []
    notes = []
    if padding.users:
        value = padding.meta["val"]
        with program.graph.inserting_before(program.placeholders()[-1].next):
            shape = sizes_of(program, shape_of(padding))
            options = {"dtype": value.dtype, "device": value.device}
            ones = program.graph.call_function(aten.ones.default, (shape,), options)
        ones.meta["val"] = value
        notes.append(Note(ones.name, f"no padding where {', '.join(user.name for user in padding.users)} reads it"))
        padding.replace_all_uses_with(ones)
    program.graph.erase_node(padding)
    refuse_other_counts(program)
    return notes


def _add_inputs(program: Program) -> dict[str, fx.Node]:
    """The new placeholders by name, with example values for shape propagation."""
    rows, layers = shape_of(program.input_ids)[0], len(program.caches)
    dtype = program.sites[0].node.meta["val"].dtype
    shapes: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {"new_lengths": ((rows,), torch.int32)}
    for site in program.sites:
        pool = (_PAGES, site.kv_heads, _PAGE)
        shapes[f"k_pages_{site.cache_group}"] = ((*pool, site.k_dim), dtype)
        shapes[f"v_pages_{site.cache_group}"] = ((*pool, site.v_dim), dtype)
        shapes[f"slot_position_{site.cache_group}"] = ((_PAGES, _PAGE), torch.int32)
        shapes[f"slot_mass_{site.cache_group}"] = ((_PAGES, _PAGE), torch.float32)
    shapes["page_table"] = ((layers, rows, _MAX_PAGES), torch.int32)
    shapes["length"] = ((layers, rows), torch.int32)
    nodes: dict[str, fx.Node] = {}
    for name, (shape, kind) in shapes.items():
        if (known := program.placeholder(name)) is not None:  # state of another kind needs `new_lengths` too
            nodes[name] = known
            continue
        with program.graph.inserting_after(program.placeholders()[-1]):
            nodes[name] = program.graph.placeholder(name)
        with fake_mode_of(program):
            nodes[name].meta["val"] = torch.empty(shape, dtype=kind, device=program.device)
    return nodes


def _insert(program: Program, site: Site, state: dict[str, fx.Node], score: tuple[float | None, bool]) -> fx.Node:
    query, key, value, _, sinks, *_ = site.node.args
    assert site.mask is not None
    mask, slopes = site.mask, _slopes(program, site)
    group = site.cache_group
    pool = [state[f"{name}_{group}"] for name in ("k_pages", "v_pages", "slot_position", "slot_mass")]
    tables = [state["page_table"], state["length"], program.placeholder("positions"), state["new_lengths"]]
    options = (sinks, slopes, site.scale, mask.window, mask.chunked, site.softcap, site.cache, *score, site.shares)
    with program.graph.inserting_before(site.node):
        node = program.graph.call_function(CACHED_OP, (query, key, value, *pool, *tables, *options))
    node.meta.update(site.node.meta)
    node.meta.pop("lethe_operands", None)
    site.node.replace_all_uses_with(node)
    program.graph.erase_node(site.node)
    return node


def _slopes(program: Program, site: Site) -> fx.Node | None:
    """The site's ALiBi slopes [heads] as a buffer of the graph; sites of equal slopes share it."""
    if site.slopes is None:
        return None
    name = f"alibi_slopes_{[s.slopes for s in program.sites].index(site.slopes)}"
    if not hasattr(program.module, name):
        program.module.register_buffer(name, torch.tensor(site.slopes, device=program.device))
    with program.graph.inserting_before(site.node):
        return program.graph.get_attr(name)
