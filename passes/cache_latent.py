"""Cache the latent: keys and values that are linear maps of one narrower tensor are never made, let alone cached."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.check import fake_mode_of
from lethe_compile.passes.linear_maps import Linears, NotLinear, Source
from lethe_compile.passes.program import Program, Site, remove_dead, shape_of, with_cache_groups
from lethe_compile.passes.reading import call, sizes_of

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheLatent:
    """Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1): absorb the maps from latent to heads.

    Where ``k[h] = cat(K[h]·c, r)`` and ``v[h] = V[h]·c``, of a latent c ``[B, T, n]`` and numbers r ``[B, T, m]`` that
    all heads share, such as a rotated part::

        attention_site(q, k, v, …)                                                      before
        V[h] · attention_site(cat(q_c·K[h], q_r), x [B, 1, T, n + m], x[…, :n], …)      after, x = cat(c, r)

    ``q·k = (q_c·K)·c + q_r·r`` and ``Σ p (V·c) = V·(Σ p c)``: the same numbers, summed in another order; the scale is
    unchanged. One KV head is cached, and its values are the first n channels of its keys, stored once: 576 numbers a
    token in DeepSeek V3, where keys and values of 128 heads are 40,960.

    What is a linear map of what is found by walking back from key and value, whatever the calls are, to the narrowest
    tensors of each token that determine them; the maps are read off by passing unit vectors through the graph's own
    calls, and proved in float64 on random ones. Weights are views of the model's own where they are parts of one.

    Conditions: values come from fewer numbers a token than they have; the maps have no constant term; and the cache
    shrinks by a larger factor than the arithmetic of attention grows, from ``Dk + Dv`` to ``n + m + n`` for each head
    and key: 71 against 3.4 in DeepSeek V3. Decode steps, which read the cache for each new token, gain by the first; a
    long prompt, bound by arithmetic, loses by the second. Measured with 16 heads of DeepSeek V3's sizes, one layer, one
    row, one CPU core: after 4,096 tokens a step takes 10.3 ms instead of 16.0, at 9.6 MiB instead of 85.0; that prompt
    takes 5.4 s instead of 3.0. To expand for prompts alone is not done: the op would need queries in both forms, and
    what a pruned cache retains would be expanded anew for each prompt that goes on from it.
    """

    enabled: bool = True

    name: ClassVar[str] = "cache-latent"

    def run(self, program: Program) -> PassResult:
        sites, matches, refusals = list(program.sites), [], []
        rewriter = _Rewriter(program)
        for site in program.sites:
            try:
                latent = rewriter.latent(site)
                if latent is None:
                    continue
                self._check(latent, site)
            except NotLinear as reason:
                sites[site.layer] = replace(site, alternative=reason.numbers)
                refusals.append(Note(site.node.name, f"keys and values stay expanded: {reason}", site.layer))
                continue
            text = f"caches {latent.width} numbers a token, not {site.numbers}: {latent.words}"
            matches.append(Note(site.node.name, text, site.layer))
            sites[site.layer] = rewriter.absorb(site, latent)
        remove_dead(program.graph)
        program.module.recompile()
        return PassResult(replace(program, sites=with_cache_groups(sites)), tuple(matches), tuple(refusals))

    def _check(self, latent: _Latent, site: Site) -> None:
        work = (latent.width + latent.v_width) / (site.k_dim + site.v_dim)
        figures = f"what they are made of has {latent.width} numbers a token, they have {site.numbers}"
        if latent.width * work >= site.numbers:
            widest = max(latent.sources, key=lambda source: source.width)
            grown = f"attention would take {work:.1f} times the arithmetic"
            raise NotLinear(f"{figures}, and {grown} ({widest.width} are of '{widest.node.name}')", latent.width)
        if not self.enabled:
            raise NotLinear(f"{figures}, and cache_latent is off", latent.width)


@dataclass(frozen=True)
class _Latent:
    """What a site's keys and values are made of, that of the values first, and the maps from all of it and from that.

    keys [kv_heads, k_dim, width], values [kv_heads, v_dim, v_width], in float64.
    """

    sources: tuple[Source, ...]
    keys: Tensor
    values: Tensor

    @property
    def width(self) -> int:
        return self.keys.shape[2]

    @property
    def v_width(self) -> int:
        return self.values.shape[2]

    @property
    def words(self) -> str:
        return " and ".join(f"'{source.node.name}'" for source in self.sources)


class _Rewriter:
    """Finds and absorbs the latents of one program."""

    def __init__(self, program: Program) -> None:
        self._program, self._graph = program, program.graph
        self._linears = Linears(program)
        self._cached: dict[Any, tuple[fx.Node, fx.Node]] = {}

    def latent(self, site: Site) -> _Latent | None:
        """What the site could cache instead; None where values come from nothing narrower than they are."""
        key, value = site.node.args[1:3]
        assert isinstance(key, fx.Node) and isinstance(value, fx.Node)
        of_value = self._linears.sources(value)
        if of_value is None or sum(s.width for s in of_value) >= site.kv_heads * site.v_dim:
            return None
        narrow = f"values are linear maps of {sum(s.width for s in of_value)} numbers a token"
        of_key = self._linears.sources(key)
        if of_key is None:
            raise NotLinear(f"{narrow}, but keys are of nothing that is one tensor of each token")
        sources = (*of_value, *(s for s in of_key if s not in of_value))
        if sum(s.width for s in sources) >= site.numbers:
            widest = max(of_key, key=lambda s: s.width)
            raise NotLinear(f"{narrow}, but keys are of {widest.width}, and '{widest.node.name}' is no linear map")
        return _Latent(sources, self._linears.map_of(key, sources), self._linears.map_of(value, of_value))

    def absorb(self, site: Site, latent: _Latent) -> Site:
        """Rewrite the site. Sites that attended to the same keys and values go on to do so."""
        node, program = site.node, self._program
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        with self._graph.inserting_before(node):
            if (key, value) not in self._cached:
                parts = [source.flattened(program) for source in latent.sources]
                whole = call(aten.cat.default, (parts, -1), program)
                whole = call(aten.unsqueeze.default, (whole, 1), program)  # [B, 1, T, width]
                self._cached[key, value] = whole, call(aten.slice.Tensor, (whole, -1, 0, latent.v_width), program)
            operands = (self._query(site, latent, query, key), *self._cached[key, value])
            out = call(node.target, (*operands, *node.args[3:]), program)  # type: ignore[arg-type]
            out.meta.update({name: kept for name, kept in node.meta.items() if name not in ("val", "lethe_operands")})
            maps = self._weight(value, latent.values, f"latent_values_{site.layer}", turned=True)
            result = self._heads(site, out, maps)
        result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)
        cached = replace(site, node=out, kv_heads=1, k_dim=latent.width, v_dim=latent.v_width, latent=True)
        return replace(cached, alternative=site.numbers)

    def _query(self, site: Site, latent: _Latent, query: fx.Node, key: fx.Node) -> fx.Node:
        """[B, H, T, width]: what of the query meets each source, through the map to the keys or as it is."""
        parts, at = [], 0
        for source in latent.sources:
            block = latent.keys[:, :, at : at + source.width]  # [kv_heads, k_dim, source]
            at += source.width
            rows = block.any(2).any(0).nonzero().flatten().tolist()
            if not rows:
                shape = sizes_of(self._program, (*shape_of(query)[:3], source.width))
                parts.append(call(aten.new_zeros.default, (query, shape), self._program))
                continue
            first, last = rows[0], rows[-1] + 1
            block = block[:, first:last]
            part = call(aten.slice.Tensor, (query, -1, first, last), self._program)
            if not _is_identity(block):
                name = f"latent_keys_{site.layer}_{source.node.name}"
                part = self._heads(site, part, self._weight(key, block, name))
            parts.append(part)
        return call(aten.cat.default, (parts, -1), self._program)

    def _weight(self, node: fx.Node, matrix: Tensor, name: str, turned: bool = False) -> fx.Node:
        """[kv_heads, dim, width], or `turned` [kv_heads, width, dim]: a view of a weight, else a buffer of its own."""
        found = self._linears.weight_of(node, matrix)
        if found is not None:
            weight, first = found
            heads, dim, width = matrix.shape
            part = call(aten.reshape.default, (weight, [heads, -1, width]), self._program)
            part = call(aten.slice.Tensor, (part, 1, first, first + dim), self._program)
        else:
            made = matrix.to(node.meta["val"].dtype)
            self._program.module.register_buffer(name, made)
            part = self._graph.get_attr(name)
            part.meta["val"] = fake_mode_of(self._program).from_tensor(made, static_shapes=True)
        return call(aten.transpose.int, (part, 1, 2), self._program) if turned else part

    def _heads(self, site: Site, x: fx.Node, weight: fx.Node) -> fx.Node:
        """``[B, H, T, n] · [kv_heads, n, m] -> [B, H, T, m]``: a product for each head of the weight."""
        program = self._program
        rows, tokens = sizes_of(program, (shape_of(x)[0], shape_of(x)[2]))
        flat = call(aten.permute.default, (x, [1, 0, 2, 3]), program)
        flat = call(aten.reshape.default, (flat, [site.kv_heads, -1, shape_of(x)[3]]), program)
        product = call(aten.bmm.default, (flat, weight), program)
        product = call(aten.reshape.default, (product, [site.heads, rows, tokens, shape_of(weight)[2]]), program)
        return call(aten.permute.default, (product, [1, 0, 2, 3]), program)


def _is_identity(maps: Tensor) -> bool:
    """Whether each of [kv_heads, n, m] is the identity: numbers that heads share as they are."""
    _, rows, columns = maps.shape
    return rows == columns and torch.equal(maps, torch.eye(rows).to(maps).expand_as(maps))
