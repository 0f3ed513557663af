"""Insert the cached op: every located site becomes `lethe::attention`, and the cache's tensors become inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.base import Note, PassResult, refuse
from lethe_compile.passes.check import fake_mode_of
from lethe_compile.passes.keep_sets import HeadRows
from lethe_compile.passes.program import (
    CACHED_OP,
    COLUMNS_OP,
    COLUMNS_SITE_OP,
    VISIBLE_OP,
    VISIBLE_SITE_OP,
    Program,
    Site,
    is_call,
    remove_dead,
    same_size,
    shape_of,
    source_of,
    with_cache_groups,
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

    Where values are channels of the keys, as `CacheLatent` makes them, there are no `v_pages`: None.

    ``columns_site(x, seen, layer, offset)``  =>  ``columns(x, k_pages, …, seen, …)``, x cached behind the key
    ``visible_site(ids, seen, …)``  =>  ``visible(slot_position, …, seen, …)``

    New inputs: `new_lengths`, for each page pool `k_pages_g`, `v_pages_g`, `slot_position_g`, `slot_mass_g`, and
    `page_table`, `length` for all caches. Layers that attend to the same keys and values under the same mask share a
    cache, to which the first of them appends.

    The input `attention_mask` goes: what still reads it, such as a factor of hidden states, finds every token real, as
    those in the cache are. ``attention_mask  =>  ones([batch, tokens])``

    Conditions: every site's mask is proved; nothing counts the ones; and no matrix of tokens × tokens is left, as it
    would be by an attention that went unrecognised.

    `decay` is RASR's gamma, None tracks no attention mass; `peak` scores by the largest probability instead of the sum.

    With `per_head`, each KV head keeps tokens of its own: around the op it is a row of the cache, see `keep_sets`.
    Masks by content are refused then: they are computed once a layer, from what the layer retains.
    """

    decay: float | None = None
    peak: bool = False
    per_head: bool = False

    name: ClassVar[str] = "insert-attention"

    def run(self, program: Program) -> PassResult:
        notes = _drop_padding(program)
        for site in program.sites:
            if site.mask is None:
                raise refuse("its mask was not classified", program, site.layer)
        sites = with_caches(program.sites)
        if self.per_head:
            sites = with_cache_groups(_split(program, sites))
        program = replace(program, sites=sites)
        state = _add_inputs(program, max(site.keep_sets for site in sites))
        columns = _columns(program, state)
        heads = HeadRows(program, state["positions"], state["new_lengths"]) if self.per_head else None
        inserted = []
        for site in program.sites:
            node = _insert(program, site, state, columns.get(site.layer, []), (self.decay, self.peak), heads)
            inserted.append(replace(site, node=node))
            owner = f", the cache of layer {program.caches[site.cache].layer}" if site.shares else ""
            notes.append(Note(node.name, f"cached in pool {site.cache_group}{owner}", site.layer))
        remove_dead(program.graph)
        _refuse_token_matrices(program)
        program.module.recompile()
        return PassResult(replace(program, sites=tuple(inserted)), tuple(notes))


def _split(program: Program, sites: Sequence[Site]) -> list[Site]:
    """Sites each of whose KV heads keeps tokens of its own."""
    for site in sites:
        if site.content:
            reason = (
                "its mask depends on the content of the sequence: it is computed once from what the layer retains, and"
                " a policy that keeps other tokens for each KV head leaves no such set"
            )
            hint = 'a policy that keeps the same tokens for all KV heads, such as "lethe", prunes this model'
            raise refuse(reason, program, site.layer, hint)
    return [replace(site, keep_sets=site.kv_heads) for site in sites]


def set_score(program: Program, decay: float | None, peak: bool) -> None:
    """Change what the cached attentions of a finished program keep as scores; `decay`, `peak` as `InsertAttention`."""
    names = [argument.name for argument in CACHED_OP._schema.arguments]
    for node in program.graph.find_nodes(op="call_function", target=CACHED_OP):
        for name, value in (("decay", decay), ("peak", peak)):
            node.update_arg(names.index(name), value)
    program.module.recompile()


_DECAY = [argument.name for argument in CACHED_OP._schema.arguments].index("decay")


def without_fading(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a cached attention by which no score fades in this step."""
    return args if args[_DECAY] is None else (*args[:_DECAY], 1.0, *args[_DECAY + 1 :])


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


def _add_inputs(program: Program, keep_sets: int) -> dict[str, fx.Node]:
    """The new placeholders by name, with example values for shape propagation, and `positions`."""
    rows, layers = shape_of(program.input_ids)[0], len(program.caches)
    dtype = program.sites[0].node.meta["val"].dtype
    shapes: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {"new_lengths": ((rows,), torch.int32)}
    for site in program.sites:
        kv_heads, k_dim, v_dim, in_keys = site.geometry
        shapes[f"k_pages_{site.cache_group}"] = ((_PAGES, kv_heads, _PAGE, k_dim), dtype)
        if not in_keys:
            shapes[f"v_pages_{site.cache_group}"] = ((_PAGES, kv_heads, _PAGE, v_dim), dtype)
        shapes[f"slot_position_{site.cache_group}"] = ((_PAGES, _PAGE), torch.int32)
        shapes[f"slot_mass_{site.cache_group}"] = ((_PAGES, _PAGE), torch.float32)
    shapes["page_table"] = ((layers, rows * keep_sets, _MAX_PAGES), torch.int32)
    shapes["length"] = ((layers, rows * keep_sets), torch.int32)
    positions = program.placeholder("positions")
    assert positions is not None, "rewrite-positions makes it an input"
    nodes = {"positions": positions}
    for name, (shape, kind) in shapes.items():
        if (known := program.placeholder(name)) is not None:  # state of another kind needs `new_lengths` too
            nodes[name] = known
            continue
        with program.graph.inserting_after(program.placeholders()[-1]):
            nodes[name] = program.graph.placeholder(name)
        with fake_mode_of(program):
            nodes[name].meta["val"] = torch.empty(shape, dtype=kind, device=program.device)
    return nodes


def _columns(program: Program, state: dict[str, fx.Node]) -> dict[int, list[fx.Node]]:
    """Replace what masks read of earlier tokens by reads of the cache; by layer, the values to cache, in order."""
    found: dict[int, list[fx.Node]] = {}
    graph, shared = program.graph, (state["page_table"], state["length"], state["positions"])
    for node in list(graph.nodes):
        if not is_call(node, COLUMNS_SITE_OP, VISIBLE_SITE_OP):
            continue
        layer = int(node.args[2 if is_call(node, COLUMNS_SITE_OP) else 4])
        site = program.sites[layer]
        slot_position, k_pages = (state[f"{name}_{site.cache_group}"] for name in ("slot_position", "k_pages"))
        rest = (slot_position, *shared, state["new_lengths"], node.args[1])
        if is_call(node, COLUMNS_SITE_OP):
            new, _, _, offset = node.args
            found.setdefault(layer, []).append(new)  # made in the order of their offsets
            call: tuple[Any, ...] = (COLUMNS_OP, (new, k_pages, *rest, site.k_dim, offset, site.cache))
        else:
            call = (VISIBLE_OP, (*rest, node.args[2], node.args[3], site.cache))
        with graph.inserting_before(node):
            inserted = graph.call_function(*call)
        node.replace_all_uses_with(inserted)
        graph.erase_node(node)
    return found


def _with_columns(program: Program, site: Site, columns: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Query and key of a site, the values to cache behind the key, and behind the query zeros that leave scores be."""
    graph, ids = program.graph, program.input_ids
    query, key = (n for n in site.node.args[:2] if isinstance(n, fx.Node))
    if not columns:
        return query, key
    rows, tokens = (graph.call_function(aten.sym_size.int, (ids, dim)) for dim in (0, 1))
    spare = site.kv_heads * site.columns - sum(int(shape_of(c)[2]) for c in columns)
    if spare:  # KV heads that do not divide what is cached
        columns = [*columns, graph.call_function(aten.new_zeros.default, (columns[0], [rows, tokens, spare]))]
    packed = graph.call_function(aten.cat.default, (columns, -1))
    packed = graph.call_function(aten.reshape.default, (packed, [rows, tokens, site.kv_heads, site.columns]))
    packed = graph.call_function(aten.transpose.int, (packed, 1, 2))
    packed = graph.call_function(aten.to.dtype, (packed, key.meta["val"].dtype))
    zeros = graph.call_function(aten.new_zeros.default, (query, [rows, site.heads, tokens, site.columns]))
    query, key = (graph.call_function(aten.cat.default, (pair, -1)) for pair in ([query, zeros], [key, packed]))
    return query, key


def _insert(
    program: Program,
    site: Site,
    state: dict[str, fx.Node],
    columns: list[fx.Node],
    score: tuple[float | None, bool],
    heads: HeadRows | None,
) -> fx.Node:
    """The cached op in the site's place, over KV heads as rows where `heads` are given."""
    value, sinks, bias = (cast("fx.Node | None", site.node.args[place]) for place in (2, 4, 5))
    assert site.mask is not None and value is not None
    mask, slopes = site.mask, _slopes(program, site)
    pool = [state.get(f"{name}_{site.cache_group}") for name in ("k_pages", "v_pages", "slot_position", "slot_mass")]
    positions, new_lengths = state["positions"], state["new_lengths"]
    bands = (site.scale, mask.window, mask.chunked, site.softcap, site.cache)
    with program.graph.inserting_before(site.node):
        query, key = _with_columns(program, site, columns)
        if heads is not None:
            query, key, value = (heads.rows(site, operand) for operand in (query, key, value))
            sinks, slopes = (heads.learned(site, operand) for operand in (sinks, slopes))
            positions, new_lengths = heads.positions, heads.new_lengths(site)
        tables = (state["page_table"], state["length"], positions, new_lengths)
        options = (sinks, slopes, *bands, *score, site.shares, *([bias] if site.content else []))
        node = program.graph.call_function(CACHED_OP, (query, key, value, *pool, *tables, *options))
        result = node if heads is None else heads.back(site, node)
    for made in {node, result}:
        made.meta.update({key: known for key, known in site.node.meta.items() if key not in ("val", "lethe_operands")})
    result.meta["val"] = site.node.meta["val"]
    site.node.replace_all_uses_with(result)
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
