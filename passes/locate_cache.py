"""Locate the cache of a decode step: its cache goes, and the graph becomes one of whole sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.cache_ops import Cache, Read, find_cache, find_read
from lethe_compile.passes.mask_constants import NotABand
from lethe_compile.passes.program import Program, argument, is_call
from lethe_compile.passes.step import Steps, moved, needed, refusal, tokenwise
from lethe_compile.passes.step_masks import StepMask, prove
from lethe_compile.passes.whole_sequence import StepSite, WholeSequence

aten = torch.ops.aten

_PRODUCTS = (aten.matmul, aten.bmm)
_SAMPLES = (0, 1, 2, 5, 17, 40)  # tokens before a step, with which its positions and counters are told


@dataclass(frozen=True)
class LocateCache:
    """Replace the cache that a decode step carries by the keys and values of the graph's own tokens.

    =====================================================================  ==============================
    before                                                                 after
    =====================================================================  ==============================
    attention over ``cat([past, k], dim=-2)``, with `past` an input and    attention over ``k``
    the result, or its last tokens, an output
    attention over a buffer or input in which `index_copy`, `index_put`,   attention over ``k``
    `slice_scatter`, `copy` … put ``k`` at the token's position
    attention over ``roll(buffer, -1)`` with ``k`` in its last slot        attention over ``k``
    a mask of the newest token over all slots                              one of the tokens over each other
    `input_pos`, `cache_position`, a counter, the length of the past       input `position_ids`
    one token, or T, of a fixed number of rows, or of B                    B rows of T tokens
    =====================================================================  ==============================

    Conditions: run on labels, the operators between a cache and what attention reads move elements alone, put a new
    token where its position says, and keep the others; the result is what the next step starts from; nothing else reads
    the cache. The mask of a step, evaluated with many numbers of tokens before it, shows a causal band over what the
    cache holds. Every position is the number of tokens before, plus a constant. A graph without `Program.step` stays
    as it is.
    """

    name: ClassVar[str] = "locate-cache"

    def run(self, program: Program) -> PassResult:
        if program.step is None:
            return PassResult(program)
        steps = Steps(program)
        caches = {state.node: find_cache(program, steps, state) for state in program.step.caches}
        sites = [_with_band(steps, site) for site in _sites(program, steps, caches)]
        _expect_all_read(caches, sites)
        rooms = [site.key.cache.room for site in sites if site.key.cache.room is not None]
        longest = min(rooms, default=None)
        samples = [past for past in _SAMPLES if longest is None or past < longest]
        _expect_counting(steps, samples)
        positions = _positions(program, steps, sites, samples)
        module = WholeSequence(program, steps, sites, positions).build()
        notes = [_note(site, layer) for layer, site in enumerate(sites)]
        return PassResult(replace(program, module=module, step=None, longest=longest), tuple(notes))


def _note(site: StepSite, layer: int) -> Note:
    cache = site.key.cache
    kind = cache.kind if cache.room is None else f"{cache.kind}, room for {cache.room} tokens"
    mask = site.band.kind if site.band.window is None else f"{site.band.kind}, window {site.band.window}"
    text = f"'{cache.state.name}' and '{site.value.cache.state.name}' gone ({kind}); the step's mask: {mask}"
    return Note(site.result.name, text, layer)


# --------------------------------------------------------------------------------------------------------------- sites


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
        if operand in scores.chain or not size or (size[-1] != keys and not _varies(operand)):
            continue
        if scores.mask is not None or not is_call(node, aten.add, aten.where, aten.masked_fill):
            raise refusal(
                node, f"scores meet '{operand.name}' in '{node.name}' ({node.target}), which is no known mask"
            )
        denies = is_call(node, aten.masked_fill) or (is_call(node, aten.where) and node.args[1] not in scores.chain)
        scores.mask = StepMask(operand, denies)


def _varies(node: fx.Node) -> bool:
    """Whether a value depends on any input."""
    return any(n.op == "placeholder" for n in needed([node]))


def _with_band(steps: Steps, site: StepSite) -> StepSite:
    try:
        return replace(site, band=prove(steps, site.mask, site.key))
    except NotABand as reason:
        raise refusal(site.result, str(reason)) from reason


def _expect_alike(steps: Steps, site: StepSite) -> None:
    """Keys and values must be of the same tokens, in the same order."""
    key, value = site.key, site.value
    kept = [(c.cache.kind, c.cache.room, steps.limits.get(c.cache.state)) for c in (key, value)]
    if key.cache.kind == "shift":
        kept = [(cache.kind, cache.shape[cache.slots], None) for cache in (key.cache, value.cache)]
    if kept[0] != kept[1]:
        names = f"'{key.cache.state.name}' and '{value.cache.state.name}'"
        raise refusal(site.result, f"its keys and values are kept differently, in {names}")


def _expect_all_read(caches: Mapping[fx.Node, Cache], sites: Sequence[StepSite]) -> None:
    read = {cache.state.node for site in sites for cache in (site.key.cache, site.value.cache)}
    for node, cache in caches.items():
        if node not in read:
            raise refusal(cache.state.after, f"no attention reads the cache '{cache.state.name}'")


# ----------------------------------------------------------------------------------------------------------- positions


def _expect_counting(steps: Steps, samples: Sequence[int]) -> None:
    """A counter must grow by one with each token."""
    for state in (s for s in steps.step.states if s.counts):
        for past in samples:
            after = int(steps.values([state.after], past)[0])
            if after != past + 1:
                reason = f"the counter '{state.name}' becomes {after} in the step after {past} tokens"
                raise refusal(state.after, reason, "it must count tokens, from 0 on")


def _positions(program: Program, steps: Steps, sites: Sequence[StepSite], samples: Sequence[int]) -> dict[fx.Node, int]:
    """The nodes through which positions enter what is computed for a token, and how much more than those they are."""
    results = {site.result: site for site in sites}
    logits: Any = program.graph.output_node().args[0]
    stack, live = [logits[0]], set()
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += results[node].operands if node in results else node.all_input_nodes
    tokens = tokenwise(program)
    candidates = [n for n in program.graph.nodes if n in live and n not in tokens and _may_count(steps, n)]
    values = [steps.values(candidates, past) for past in samples]
    offsets: dict[fx.Node, int] = {}
    for node, counts in zip(candidates, zip(*values, strict=True), strict=True):
        offset = int(counts[0].flatten()[0]) - samples[0]
        if all(bool((count == past + offset).all()) for count, past in zip(counts, samples, strict=True)):
            offsets[node] = offset
    used = {n: offset for n, offset in offsets.items() if any(u in live and u not in offsets for u in n.users)}
    return used | _table_rows(steps, [n for n in program.graph.nodes if n in live and n not in tokens], samples)


def _table_rows(steps: Steps, nodes: Sequence[fx.Node], samples: Sequence[int]) -> dict[fx.Node, int]:
    """Of ``table[past + c : past + c + 1]``, with a table of numbers that is a constant, each and its c."""
    found = {}
    for node in (n for n in nodes if is_call(n, aten.slice) and n.meta["val"].is_floating_point()):
        start = argument(node, 2, "start")
        if argument(node, 1, "dim", 0) == 0 and isinstance(start, fx.Node) and not _varies(node.all_input_nodes[0]):
            offsets = {steps.values([start], past)[0] - past for past in samples}
            if len(offsets) == 1 and steps.size(node)[0] == 1:
                found[node] = int(offsets.pop())
    return found


def _may_count(steps: Steps, node: fx.Node) -> bool:
    """Whether `node` may be one position a row, or one for all."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool or node.op == "get_attr":
        return False
    rows, *others = steps.size(node) or (1,)
    return rows in (1, steps.rows) and all(size == 1 for size in others) and _varies(node)
