"""Find where the position of a token enters a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.program import Program, argument, is_call
from lethe_compile.passes.step import MOST, Steps, refusal, tokenwise, varies
from lethe_compile.passes.step_sites import StepSite

aten = torch.ops.aten

_SAMPLES = (0, 1, 2, 5, 17, 40)  # tokens before a step, with which its positions and counters are told


def find_positions(
    program: Program, steps: Steps, sites: Sequence[StepSite], longest: int | None
) -> dict[fx.Node, int]:
    """The nodes through which positions enter what is computed for a token, and how much more than those they are.

    They are told by their values with several numbers of tokens before the step, among them those around every constant
    that they are computed with: a position that stops at one, or starts again, is none.

    Raises:
        UnsupportedGraphError: a counter of the step does not count tokens.
    """
    live = _live(program, sites)
    tokens = tokenwise(program)
    others = [n for n in program.graph.nodes if n in live and n not in tokens]
    candidates = [n for n in others if _may_count(steps, n)]
    counters = [state.after for state in steps.step.states if state.counts]
    edges = {edge for c in steps.constants([*candidates, *counters]) for edge in (c - 1, c, c + 1)}
    last = MOST if longest is None else longest - 1
    samples = sorted(past for past in {*_SAMPLES, *edges, last} if 0 <= past <= last)
    _expect_counting(steps, samples)
    values = [steps.values(candidates, past) for past in samples]
    offsets: dict[fx.Node, int] = {}
    for node, counts in zip(candidates, zip(*values, strict=True), strict=True):
        offset = int(counts[0].flatten()[0]) - samples[0]
        if all(bool((count == past + offset).all()) for count, past in zip(counts, samples, strict=True)):
            offsets[node] = offset
    used = {n: offset for n, offset in offsets.items() if any(u in live and u not in offsets for u in n.users)}
    return used | _table_rows(steps, others, samples)


def _live(program: Program, sites: Sequence[StepSite]) -> set[fx.Node]:
    """What the logits are computed from once the caches are gone."""
    results = {site.result: site for site in sites}
    logits: Any = program.graph.output_node().args[0]
    stack, live = [logits[0]], set()
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += results[node].operands if node in results else node.all_input_nodes
    return live


def _expect_counting(steps: Steps, samples: Sequence[int]) -> None:
    """A counter must grow by one with each token."""
    for state in (s for s in steps.step.states if s.counts):
        for past in samples:
            after = int(steps.values([state.after], past)[0])
            if after != past + 1:
                reason = f"the counter '{state.name}' becomes {after} in the step after {past} tokens"
                raise refusal(state.after, reason, "it must count tokens, from 0 on")


def _table_rows(steps: Steps, nodes: Sequence[fx.Node], samples: Sequence[int]) -> dict[fx.Node, int]:
    """Of ``table[past + c : past + c + 1]``, with a table of numbers that is a constant, each and its c."""
    found = {}
    for node in (n for n in nodes if is_call(n, aten.slice) and n.meta["val"].is_floating_point()):
        start = argument(node, 2, "start")
        if argument(node, 1, "dim", 0) == 0 and isinstance(start, fx.Node) and not varies(node.all_input_nodes[0]):
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
    return rows in (1, steps.rows) and all(size == 1 for size in others) and varies(node)
