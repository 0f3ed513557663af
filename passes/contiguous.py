"""The decomposition: a program over pages, written with ops of our own, becomes one that any runtime can take.

    optimized program                                =>  a graph of core aten, without writes
    ``lethe::attention(q, k, v, *pages, …)``         =>  `kernels.attention.contiguous`: append, attend, score
    ``lethe::linears(x, weights, biases)``           =>  linear maps side by side
    page pools and a page table, written in place    =>  ``k_i``, ``v_i``, positions and masses, taken and returned

It serves every format that cannot carry our kernels, and is traced by `torch.export` afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.kernels.attention import contiguous
from lethe_compile.passes.fuse_projections import LINEARS
from lethe_compile.passes.outline import Outline, narrowed, outline
from lethe_compile.passes.program import CACHED_OP, Program, attribute, is_call, source_of

aten = torch.ops.aten

INPUTS = ("input_ids", "positions", "new_lengths")
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

    `decay` ``[1]`` float32, the factor on masses, is an input where the program keeps scores: a prompt may be handed over
    in parts, which count as one step if all parts but the first come with a factor of 1. Logits ``[rows, vocab]`` float32 are those of each row's last new token. State is that of `state_names`, each
    cache ``[rows, kv_heads, capacity, dim]``. Weights stay under the names that they have in the program.

    Raises:
        UnsupportedGraphError: as `refuse_what_has_no_contiguous_form`.
    """
    refuse_what_has_no_contiguous_form(program)
    return _Builder(program).build()


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
        self.values: dict[fx.Node, fx.Node] = {}
        self.names: dict[int, str] = {}  # of weights, by identity
        self.decay: fx.Node | None = None

    def build(self) -> fx.GraphModule:
        caches = self._inputs()
        sites = {site.node: site for site in self.program.sites}
        final = len(self.outline.spans) - 1
        for index, span in enumerate(self.outline.spans):
            inputs = [self._value(node) for node in span.inputs]
            if index == final:
                inputs = self._last_tokens(span, inputs)
            region = self.outline.regions[span.region].graph
            outputs = self._inline(region, inputs)
            self.values.update(zip(span.outputs, outputs, strict=True))
            if index < final:
                cut = self.outline.cuts[index]
                assert is_call(cut, CACHED_OP), "other state is refused first"
                self.values[cut] = self._attention(cut, caches[sites[cut].cache])
        return self._finish(caches)

    def _inputs(self) -> list[_Cache]:
        nodes = {name: self.graph.placeholder(name) for name in INPUTS}
        for node in self.program.placeholders():
            if node.target in nodes:
                self.values[node] = nodes[str(node.target)]
        if any(site.node.args[18] is not None for site in self.program.sites):
            self.decay = self.graph.placeholder("decay")
        count = len(self.program.caches)
        state = {name: self.graph.placeholder(name) for name in state_names(count)}
        select = aten.select.int
        return [
            _Cache(
                state[f"k_{index}"],
                state[f"v_{index}"],
                *(self.graph.call_function(select, (state[name], 0, index)) for name in SHARED_STATE),
            )
            for index in range(count)
        ]

    def _value(self, node: fx.Node) -> fx.Node:
        if node not in self.values:
            assert node.op == "get_attr", f"{node.name} is no weight, and was not computed"
            name = str(node.target)
            first = self.names.setdefault(id(attribute(self.program.module, name)), name)  # tied weights are one
            self.values[node] = self.graph.get_attr(first)
        return self.values[node]

    def _inline(self, region: fx.Graph, inputs: list[fx.Node]) -> tuple[fx.Node, ...]:
        placeholders = [node for node in region.nodes if node.op == "placeholder"]
        values = dict(zip(placeholders, inputs, strict=True))
        outputs: Any = self.graph.graph_copy(region, values)
        for node in values.values():
            if node.op == "call_function" and node.target is LINEARS:
                node.target = _linears
        return tuple(outputs)

    def _attention(self, cut: fx.Node, cache: _Cache) -> fx.Node:
        """The calls that stand for one `lethe::attention`; `cache` is that after it."""
        call = self.graph.call_function
        operands = (*cut.args[:3], *cut.args[9:13])
        query, key, value, positions, new_lengths, sinks, slopes = (
            self._value(node) if isinstance(node, fx.Node) else None for node in operands
        )
        scale, window, chunked, softcap, _, decay, peak, shares = cut.args[13:21]
        if not shares:
            cache.k = call(contiguous.append, (cache.k, key, cache.length))
            cache.v = call(contiguous.append, (cache.v, value, cache.length))
            cache.position = call(contiguous.append_position, (cache.position, positions, cache.length))
        state = (cache.k, cache.v, cache.position, cache.length, positions, new_lengths)
        both = call(contiguous.attend, (query, *state, sinks, slopes, scale, window, chunked, softcap, bool(peak)))
        out, seen = (call(_item, (both, index)) for index in (0, 1))
        if decay is not None:
            score = (cache.mass, seen, cache.length, new_lengths, self.decay, peak, shares)
            cache.mass = call(contiguous.score, score)
        return out

    def _last_tokens(self, span: Any, inputs: list[fx.Node]) -> list[fx.Node]:
        """Inputs of the final span of each row's last token alone, where nothing there mixes tokens."""
        dims = dict(narrowed(self.program, span) or ())
        return [
            self.graph.call_function(last_token, (given, dims[node], self._new_lengths)) if node in dims else given
            for node, given in zip(span.inputs, inputs, strict=True)
        ]

    @property
    def _new_lengths(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.target == "new_lengths")

    def _finish(self, caches: list[_Cache]) -> fx.GraphModule:
        call = self.graph.call_function
        output: Any = self.program.graph.output_node().args[0]
        logits = self.values[output]
        if narrowed(self.program, self.outline.spans[-1]) is None:
            logits = call(last_token, (logits, 1, self._new_lengths))
        logits = call(aten.to.dtype, (call(aten.select.int, (logits, 1, 0)), torch.float32))
        length = next(node for node in self.graph.nodes if node.target == "length")
        stacked = [call(aten.stack.default, ([getattr(c, name) for c in caches],)) for name in ("position", "mass")]
        after = call(aten.add.Tensor, (length, self._new_lengths))
        self.graph.output((logits, *(x for c in caches for x in (c.k, c.v)), *stacked, after))
        self.graph.lint()
        return fx.GraphModule(self.program.module, self.graph)


def last_token(value: Tensor, dim: int, new_lengths: Tensor) -> Tensor:
    """`value` [rows, …] at each row's last new token, along the dimension `dim` of tokens, which stays with size 1."""
    shape = [1] * value.dim()
    shape[0] = value.shape[0]
    index = (new_lengths.long() - 1).clamp(min=0).view(shape)
    return value.gather(dim, index.expand(*(n if d != dim else 1 for d, n in enumerate(value.shape))))


def _linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`lethe::linears` as the linear maps that it stands for."""
    given = biases or [None] * len(weights)
    maps = zip(weights, given, strict=True)
    return torch.cat([torch.nn.functional.linear(x, weight, bias) for weight, bias in maps], dim=-1)


def _item(pair: tuple[Tensor, Tensor], index: int) -> Tensor:
    return pair[index]
