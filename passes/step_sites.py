"""Find the attentions of a decode step: from a product with keys of a cache to that with values, or one node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lethe_compile.passes.cache_ops import Cache, Read, find_cache, find_read
from lethe_compile.passes.program import Mask, Program, argument, is_call
from lethe_compile.passes.step import Steps, moved, needed, refusal, varies
from lethe_compile.passes.step_masks import StepMask

aten = torch.ops.aten

_PRODUCTS = (aten.matmul, aten.bmm)


@dataclass(frozen=True)
class StepSite:
    """An attention of the step: from the product of queries and keys to that with the values, or one node."""

    query: fx.Node
    key: Read
    value: Read
    chain: tuple[fx.Node, ...]  # in graph order; the last is its result
    mask: StepMask | None
    band: Mask = field(default_factory=Mask)  # what the mask was proved to be

    @property
    def result(self) -> fx.Node:
        return self.chain[-1]

    @property
    def operands(self) -> list[fx.Node]:
        """What it is computed from once it attends over the sequence alone."""
        replaced = {self.query, self.key.node, self.value.node, *self.chain}
        if self.mask is not None:
            replaced.add(self.mask.node)
        others = [n for node in self.chain for n in node.all_input_nodes if n not in replaced]
        return list(dict.fromkeys([self.query, self.key.cache.new, self.value.cache.new, *others]))


def find_sites(program: Program, steps: Steps) -> list[StepSite]:
    """Every attention of `program`, in graph order, its mask not yet proved to be anything.

    Raises:
        UnsupportedGraphError: a cache is not kept as caches are, is read by anything else, or by nothing.
    """
    assert program.step is not None
    caches = {state.node: find_cache(program, steps, state) for state in program.step.caches}
    sites = _sites(program, steps, caches)
    read = {cache.state.node for site in sites for cache in (site.key.cache, site.value.cache)}
    for node, cache in caches.items():
        if node not in read:
            raise refusal(cache.state.after, f"no attention reads the cache '{cache.state.name}'")
    return sites


@dataclass
class _Scores:
    """An attention of which the product of queries and keys has been met, but not that with the values."""

    query: fx.Node
    key: Read
    chain: list[fx.Node] = field(default_factory=list)
    mask: StepMask | None = None


def _sites(program: Program, steps: Steps, caches: Mapping[fx.Node, Cache]) -> list[StepSite]:
    """Every attention, in graph order. Whatever else reads a cache is refused."""
    owner = {copy: cache for node, cache in caches.items() for copy in moved(node)}
    output = program.graph.output_node()
    live = set(needed(output.all_input_nodes))
    scores: dict[fx.Node, _Scores] = {}
    found: list[StepSite] = []
    for node in (n for n in program.graph.nodes if n in live and n not in owner and not is_call(n, aten.sym_size)):
        read = [n for n in node.all_input_nodes if n in owner]
        under_way = next((scores[n] for n in node.all_input_nodes if n in scores), None)
        product = is_call(node, *_PRODUCTS) and len(read) == 1 and node.args[1] is read[0]
        if read and is_call(node, aten.scaled_dot_product_attention):
            found.append(_from_sdpa(steps, node, owner))
        elif product and under_way is None:
            query: Any = node.args[0]
            scores[node] = _Scores(query, find_read(steps, owner[read[0]], read[0], keys_last=True), [node])
        elif product and under_way is not None:
            value = find_read(steps, owner[read[0]], read[0], keys_last=False)
            chain = (*under_way.chain, node)
            found.append(StepSite(under_way.query, under_way.key, value, chain, under_way.mask))
        elif read:
            name = owner[read[0]].state.name
            raise refusal(node, f"the cache '{name}' is read by '{node.name}' ({node.target}), which is no attention")
        elif under_way is not None:
            _find_mask(steps, under_way, node)
            under_way.chain.append(node)
            scores[node] = under_way
    if not found:
        raise refusal(output, "no attention reads a cache of the graph")
    for site in found:
        _expect_alike(steps, site)
    return found


def _from_sdpa(steps: Steps, node: fx.Node, owner: Mapping[fx.Node, Cache]) -> StepSite:
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    if key not in owner or value not in owner or query in owner:
        raise refusal(node, "its keys and values do not both come from a cache")
    if argument(node, 5, "is_causal", False):
        raise refusal(node, "is_causal=True shows a new token the oldest key alone", "give it a mask of positions")
    if argument(node, 4, "dropout_p", 0.0):
        raise refusal(node, "it applies dropout", "call model.eval() before exporting")
    mask = argument(node, 3, "attn_mask")
    keys, values = (find_read(steps, owner[n], n, keys_last=False) for n in (key, value))
    return StepSite(query, keys, values, (node,), None if mask is None else StepMask(mask))


def _find_mask(steps: Steps, scores: _Scores, node: fx.Node) -> None:
    """Take note of a mask where one is applied to scores; a constant of one element is none."""
    keys = steps.size(scores.chain[0])[-1]
    for operand in node.all_input_nodes:
        size = steps.size(operand)
        if operand in scores.chain or not size or (size[-1] != keys and not varies(operand)):
            continue
        if scores.mask is not None or not is_call(node, aten.add, aten.where, aten.masked_fill):
            raise refusal(
                node, f"scores meet '{operand.name}' in '{node.name}' ({node.target}), which is no known mask"
            )
        denies = is_call(node, aten.masked_fill) or (is_call(node, aten.where) and node.args[1] not in scores.chain)
        scores.mask = StepMask(operand, denies)


def _expect_alike(steps: Steps, site: StepSite) -> None:
    """Keys and values must be of the same tokens, in the same order."""
    key, value = site.key, site.value
    kept = [(c.cache.kind, c.cache.room, steps.limits.get(c.cache.state)) for c in (key, value)]
    if key.cache.kind == "shift":
        kept = [(read.cache.kind, read.before(steps, 0), None) for read in (key, value)]
    if kept[0] != kept[1]:
        names = f"'{key.cache.state.name}' and '{value.cache.state.name}'"
        raise refusal(site.result, f"its keys and values are kept differently, in {names}")
