"""The decomposition: a program over pages, written with ops of our own, becomes one that any runtime can take.

    optimized program                                =>  calls of modules of core aten, without writes
    ``lethe::attention(q, k, v, *pages, …)``         =>  `CachedAttention`: append, attend, score
    ``lethe::linears(x, weights, biases)``           =>  linear maps side by side
    transformers' product of sorted rows and experts =>  every expert, masked
    page pools and a page table, written in place    =>  ``k_i``, ``v_i``, positions and masses, taken and returned

It serves every format that cannot carry our kernels. Layers that are alike call the same modules with other weights, so
that a format can be made of each once, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.kernels.attention import contiguous
from lethe_compile.passes.fuse_projections import LINEARS
from lethe_compile.passes.outline import Outline, Span, narrowed, outline
from lethe_compile.passes.program import CACHED_OP, Program, Site, attribute, is_call, source_of

SHARED_STATE = ("position", "mass", "length")
"""State of all caches in one tensor: ``[caches, rows, capacity]`` int32 and float32, ``[caches, rows]`` int32."""


def state_names(caches: int) -> tuple[str, ...]:
    """Names of a contiguous cache's tensors, as inputs: ``k_i, v_i`` of each cache i, then `SHARED_STATE`."""
    return (*(f"{kind}_{cache}" for cache in range(caches) for kind in ("k", "v")), *SHARED_STATE)


def refuse_what_has_no_contiguous_form(program: Program) -> None:
    """Raise for what the decomposition does not know.

    Raises:
        UnsupportedGraphError: layers that keep other state than keys and values, or whose mask depends on the content.
    """
    hint = "Export is for models whose every layer keeps keys and values alone"
    if program.stateful:
        names = ", ".join(call.name for call in program.stateful)
        raise UnsupportedGraphError(f"recurrent state cannot be exported: {names} keep some", hint=hint)
    if apart := [site for site in program.sites if site.keep_sets > 1]:
        raise UnsupportedGraphError(
            "keep-sets of each KV head cannot be exported", layer=apart[0].layer, hint="Choose a policy by layer"
        )
    content = [site for site in program.sites if site.content or site.columns]
    if content:
        layers = ", ".join(str(site.layer) for site in content)
        raise UnsupportedGraphError(
            f"masks that depend on the content of the sequence cannot be exported: layers {layers} have one",
            layer=content[0].layer,
            node=content[0].node.name,
            where=source_of(content[0].node) or None,
            hint=hint,
        )


def contiguous_step(program: Program) -> fx.GraphModule:
    """``(input_ids, positions, new_lengths, [decay,] *state) -> (logits, *state)``, of any batch and number of tokens.

    `decay` ``[1]`` float32, the factor on masses, is an input where the program keeps scores: a prompt may be handed
    over in parts, which count as one step if all parts but the first come with a factor of 1. Logits ``[rows, vocab]``
    float32 are those of each row's last new token. State is that of `state_names`, each cache ``[rows, kv_heads,
    capacity, dim]``. The graph holds inputs, weights under the names that they have in the program, and calls of
    modules, nothing else.

    Raises:
        UnsupportedGraphError: as `refuse_what_has_no_contiguous_form`.
    """
    refuse_what_has_no_contiguous_form(program)
    return _Builder(program).build()


def paged_step(program: Program) -> fx.GraphModule:
    """The program as it is, `lethe::attention` over pages included, but for logits: as those of `contiguous_step`.

    Its inputs are the program's; the cache is written in place.

    Raises:
        UnsupportedGraphError: as `refuse_what_has_no_contiguous_form`.
    """
    refuse_what_has_no_contiguous_form(program)
    return PagedBuilder(program).build()


class CachedAttention(nn.Module):
    """Append, attend and score: one `lethe::attention` over a contiguous cache, as a function.

    ``(query, key, value, k, v, position, mass, length, positions, new_lengths, *[decay], *[sinks], *[slopes])
    -> (out, k, v, position, mass)``; a layer that shares its cache appends nothing.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.has_sinks, self.has_slopes = (node is not None for node in arguments[11:13])
        self.scale, self.window, self.chunked, self.softcap = arguments[13:17]
        decay, self.peak, self.shares = arguments[18:21]
        self.scores = decay is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        mass: Tensor,
        length: Tensor,
        positions: Tensor,
        new_lengths: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        optional = list(rest)
        decay, sinks, slopes = (
            optional.pop(0) if given else None for given in (self.scores, self.has_sinks, self.has_slopes)
        )
        if not self.shares:
            k, v = contiguous.append(k, key, length), contiguous.append(v, value, length)
            position = contiguous.append_position(position, positions, length)
        state = (k, v, position, length, positions, new_lengths)
        bands = (self.scale, self.window, self.chunked, self.softcap, self.peak)
        out, seen = contiguous.attend(query, *state, sinks, slopes, *bands)
        if decay is not None:
            mass = contiguous.score(mass, seen, length, new_lengths, decay, self.peak, self.shares)
        return out, k, v, position, mass


class Begin(nn.Module):
    """The first span, and the shared state taken apart: ``(position, mass, length, *inputs) -> (*span, *state)``.

    State is that of each cache, one cache after the other.
    """

    def __init__(self, region: fx.GraphModule) -> None:
        super().__init__()
        self.region = region

    def forward(self, position: Tensor, mass: Tensor, length: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        caches = zip(position.unbind(0), mass.unbind(0), length.unbind(0), strict=True)
        return (*self.region(*inputs), *(tensor for cache in caches for tensor in cache))


class End(nn.Module):
    """The last span, and the shared state put together, lengths advanced.

    ``(new_lengths, length, *positions, *masses, *inputs) -> (logits, position, mass, length)``
    """

    def __init__(self, span: LastSpan, caches: int) -> None:
        super().__init__()
        self.span, self.caches = span, caches

    def forward(self, new_lengths: Tensor, length: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        count = self.caches
        positions, masses, inputs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        logits = self.span(new_lengths, *inputs)
        return logits, torch.stack(positions), torch.stack(masses), length + new_lengths


class LastSpan(nn.Module):
    """The span behind the last attention, for each row's last new token: ``(new_lengths, *inputs) -> logits``.

    `dims` says which dimension of each input counts tokens; None: something there mixes them, so the span runs on all.
    """

    def __init__(self, region: fx.GraphModule, dims: Sequence[int | None] | None) -> None:
        super().__init__()
        self.region, self.dims = region, dims

    def forward(self, new_lengths: Tensor, *inputs: Tensor) -> Tensor:
        dims = self.dims or [None] * len(inputs)
        last = [x if dim is None else _last(x, dim, new_lengths) for x, dim in zip(inputs, dims, strict=True)]
        logits: Tensor = self.region(*last)[0]
        return (_last(logits, 1, new_lengths) if self.dims is None else logits)[:, 0].float()


def _last(value: Tensor, dim: int, new_lengths: Tensor) -> Tensor:
    """`value` [rows, …] at each row's last new token, along the dimension `dim` of tokens, which stays with size 1."""
    shape = [1] * value.dim()
    shape[0] = value.shape[0]
    index = (new_lengths.long() - 1).clamp(min=0).view(shape)
    return value.gather(dim, index.expand(*(n if d != dim else 1 for d, n in enumerate(value.shape))))


@dataclass
class _Cache:
    """Nodes of one cache while the graph is built."""

    k: fx.Node
    v: fx.Node
    position: fx.Node
    mass: fx.Node
    length: fx.Node  # before this step


class _Builder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.outline: Outline = outline(program)
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[fx.Node, fx.Node] = {}  # of the program to those of the graph
        self.weights: dict[int, str] = {}  # names by identity: tied weights are one
        self.attentions: dict[tuple[Any, ...], str] = {}
        self.given: dict[str, fx.Node] = {}  # the graph's inputs

    def build(self) -> fx.GraphModule:
        caches = self._begin()
        sites = {site.node: site for site in self.program.sites}
        for index, cut in enumerate(self.outline.cuts):
            assert is_call(cut, CACHED_OP), "other state is refused first"
            if index:
                self._span(self.outline.spans[index])
            self._attention(sites[cut], caches)
        self.graph.output(self._end(caches))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    def _inputs(self, names: Sequence[str]) -> dict[str, fx.Node]:
        given = {name: self.graph.placeholder(name) for name in names}
        for node in self.program.placeholders():
            if node.target in given:
                self.values[node] = given[str(node.target)]
        return given

    def _begin(self) -> list[_Cache]:
        count, scored = len(self.program.caches), any(site.node.args[18] is not None for site in self.program.sites)
        names = ("input_ids", "positions", "new_lengths", *(["decay"] if scored else []), *state_names(count))
        self.given = self._inputs(names)
        span = self.outline.spans[0]
        inputs = (*(self.given[name] for name in SHARED_STATE), *map(self._value, span.inputs))
        results = self._call("begin", Begin(self._region(span)), inputs, len(span.outputs) + 3 * count)
        self.values.update(zip(span.outputs, results, strict=False))
        parts = results[len(span.outputs) :]
        return [_Cache(self.given[f"k_{i}"], self.given[f"v_{i}"], *parts[3 * i : 3 * i + 3]) for i in range(count)]

    def _span(self, span: Span) -> None:
        inputs = tuple(map(self._value, span.inputs))
        outputs = self._call(f"region_{span.region}", self._region(span), inputs, len(span.outputs))
        self.values.update(zip(span.outputs, outputs, strict=True))

    def _end(self, caches: list[_Cache]) -> Any:
        slots = [getattr(cache, name) for name in ("position", "mass") for cache in caches]
        inputs = (self.given["new_lengths"], self.given["length"], *slots, *self._last_inputs())
        logits, *state = self._call("end", End(self._last_span(), len(caches)), inputs, 4)
        return logits, *(x for cache in caches for x in (cache.k, cache.v)), *state

    def _last_span(self) -> LastSpan:
        span = self.outline.spans[-1]
        dims = narrowed(self.program, span)
        by_node = None if dims is None else [dict(dims).get(node) for node in span.inputs]
        return LastSpan(self._region(span), by_node)

    def _last_inputs(self) -> list[fx.Node]:
        return [self._value(node) for node in self.outline.spans[-1].inputs]

    def _region(self, span: Span) -> fx.GraphModule:
        return _rewritten(self.outline.regions[span.region], self._decomposed())

    def _decomposed(self) -> Mapping[str, Callable[..., Tensor]]:
        """What takes the place of ops that a format lacks, by their names."""
        return DECOMPOSED

    def _attention(self, site: Site, caches: list[_Cache]) -> None:
        arguments, cache = site.node.args, caches[site.cache]
        query, key, value, positions, new_lengths = (self._value(n) for n in (*arguments[:3], *arguments[9:11]))
        optional = (self.given.get("decay"), *(n if n is None else self._value(n) for n in arguments[11:13]))
        state = (cache.k, cache.v, cache.position, cache.mass, cache.length)
        given = (query, key, value, *state, positions, new_lengths, *(n for n in optional if n is not None))
        kind = (site.heads, *site.geometry, *(n is None for n in optional), *arguments[13:17], *arguments[18:21])
        name = self.attentions.setdefault(kind, f"attention_{len(self.attentions)}")
        out, *after = self._call(name, CachedAttention(arguments), given, 5)
        cache.k, cache.v, cache.position, cache.mass = after
        self.values[site.node] = out

    def _call(self, name: str, module: nn.Module, inputs: tuple[fx.Node, ...], outputs: int) -> list[fx.Node]:
        if not hasattr(self.root, name):
            self.root.add_module(name, module)
        node = self.graph.call_module(name, inputs)
        return [self.graph.call_function(getitem, (node, index)) for index in range(outputs)]

    def _value(self, node: Any) -> fx.Node:
        if node not in self.values:
            assert node.op == "get_attr", f"{node.name} is no weight, and was not computed"
            name = str(node.target)
            weight = attribute(self.program.module, name)
            first = self.weights.setdefault(id(weight), name)
            _place(self.root, first, weight)
            self.values[node] = self.graph.get_attr(first)
        return self.values[node]


class PagedBuilder(_Builder):
    """The same spans, around the ops that they were cut at."""

    def _begin(self) -> list[_Cache]:
        self.given = self._inputs(self._names())
        self._span(self.outline.spans[0])
        return []

    def _names(self) -> Sequence[str]:
        return [str(node.target) for node in self.program.placeholders()]

    def _attention(self, site: Site, caches: list[_Cache]) -> None:
        self.values[site.node] = self.graph.node_copy(site.node, self._value)

    def _end(self, caches: list[_Cache]) -> Any:
        self.root.add_module("end", self._last_span())
        return self.graph.call_module("end", (self.given["new_lengths"], *self._last_inputs()))


def _place(root: nn.Module, path: str, weight: Tensor) -> None:
    """Make `weight` the attribute of `root` that a dotted path names."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if isinstance(weight, nn.Parameter):
        root.register_parameter(name, weight)
    else:
        root.register_buffer(name, weight)


def _rewritten(region: fx.GraphModule, functions: Mapping[str, Callable[..., Tensor]]) -> fx.GraphModule:
    """A region with functions in the place of ops that are defined in Python, here or in transformers."""
    foreign = [node for node in region.graph.nodes if str(node.target) in functions]
    if not foreign:
        return region
    graph = fx.Graph()
    graph.output(graph.graph_copy(region.graph, {}))
    for node in graph.nodes:
        node.target = functions.get(str(node.target), node.target)
    return fx.GraphModule(region, graph)


def _linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    maps = zip(weights, given, strict=True)
    return torch.cat([nn.functional.linear(x, weight, bias) for weight, bias in maps], dim=-1)


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [S, K], sorted by expert, times the weight [G, K, N] of each one's; expert g's end at `ends` [G].

    Every expert is applied to every row: no runtime takes a loop over as many rows as data says.
    """
    row = torch.arange(x.shape[0], device=x.device)
    expert = (row[:, None] >= ends).sum(1)  # [S]
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for index in range(weight.shape[0]):
        out = torch.where((expert == index)[:, None], x @ weight[index], out)
    return out


DECOMPOSED: Mapping[str, Callable[..., Tensor]] = {
    str(LINEARS): _linears,
    "transformers.grouped_mm_fallback.default": _grouped_mm,
}
