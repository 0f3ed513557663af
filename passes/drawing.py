"""A graph as boxes and arrows, few enough to look at: nodes of one layer are one box, each attention one of its own.

A box is what lies between two attentions in one layer, so that a decoder draws as a chain: embedding, then for each
layer what makes its queries, its attention, and what follows, and the head. Weights and sizes are no boxes, and
neither are the tensors of the cache: the attention that writes them says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from lethe_compile.passes.check import CACHE_INPUTS
from lethe_compile.passes.program import (
    CACHED_OP,
    SITE_OP,
    STATEFUL_OP,
    STATEFUL_SITE_OP,
    Program,
    is_call,
    may_be_attention,
    module_path,
)
from lethe_compile.passes.text import sizes_named, target_text, type_text

MOST = 60  # nodes that are drawn one by one
_LAYER = re.compile(r"(.*?\.\d+|\d+)(?:\.|$)")
_SHOWN = 5  # operators that a box lists


@dataclass(frozen=True)
class Box:
    """One box. `kind`: "input", "output", "attention", "state" (a stateful module), "cache", "block", or "node"."""

    id: str
    kind: str
    label: str
    detail: str
    nodes: int  # of the graph, that it stands for
    layer: str = ""  # the path of the module that repeats, such as "model.layers.3"


@dataclass(frozen=True)
class Drawing:
    """Boxes in order of execution, and arrows between them by their ids."""

    boxes: tuple[Box, ...]
    arrows: tuple[tuple[str, str], ...]
    nodes: int  # of the graph
    folded: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Drawing:
        """What `to_dict` gave, from JSON too."""
        boxes = tuple(Box(**box) for box in values["boxes"])
        arrows = tuple((str(source), str(target)) for source, target in values["arrows"])
        return cls(boxes, arrows, values["nodes"], values["folded"])


def draw(program: Program, most: int = MOST) -> Drawing:
    """Draw a graph; one of more than `most` calls is folded."""
    shown = [node for node in program.graph.nodes if not _is_operand(node, program)]
    folded = len(shown) > most
    groups = _Groups(program)
    of = {node: groups.of(node) if folded else node.name for node in shown}
    members: dict[str, list[fx.Node]] = {}
    for node in shown:
        members.setdefault(of[node], []).append(node)
    boxes = tuple(groups.box(name, nodes) for name, nodes in members.items())
    arrows = dict.fromkeys(
        (of[source], of[node])
        for node in shown
        for source in node.all_input_nodes
        if of.get(source, of[node]) != of[node]
    )
    return Drawing(boxes, tuple(arrows), len(program.graph.nodes), folded)


def is_attention(node: fx.Node) -> bool:
    """Whether a node is, or, before all is located, may be, where queries meet keys."""
    return is_call(node, SITE_OP, torch.ops.aten.scaled_dot_product_attention) or may_be_attention(node)


def _is_operand(node: fx.Node, program: Program) -> bool:
    """Whether a node is a weight, a size, or a tensor of the cache."""
    if node.op == "get_attr" or is_call(node, torch.ops.aten.sym_size):
        return True
    return node.op == "placeholder" and program.step is None and str(node.target).startswith(CACHE_INPUTS)


class _Groups:
    """Which box each node belongs to, and what the box says."""

    def __init__(self, program: Program) -> None:
        self._program, self._names = program, sizes_named(program)
        self._states = {state.node for state in program.step.states} if program.step is not None else set()
        self._rank: dict[fx.Node, int] = {}  # attentions on the longest way to a node
        for node in program.graph.nodes:
            behind = (self._rank[n] + _cuts(n) for n in node.all_input_nodes)
            self._rank[node] = max(behind, default=0)
        for node in reversed(program.graph.nodes):  # what a layer computes early is drawn where the layer takes it
            users = [n for n in node.users if _layer(module_path(n)) == _layer(module_path(node)) != ""]
            if users and len(users) == len(node.users) and not _cuts(node):
                self._rank[node] = max(self._rank[node], min(self._rank[n] for n in users))

    def of(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output") or _cuts(node):
            return "cache" if node in self._states else node.name
        path = module_path(node)
        return f"{self._rank[node]}:{_layer(path) or path}"

    def box(self, name: str, nodes: list[fx.Node]) -> Box:
        node = nodes[0]
        layer = _layer(module_path(node))
        if is_attention(node):
            return Box(name, "attention", *self._attention(node), 1, layer)
        if is_call(node, STATEFUL_OP, STATEFUL_SITE_OP):
            return Box(name, "state", module_path(node) or node.name, target_text(node), 1, layer)
        if node in self._states:
            assert self._program.step is not None
            names = [state.name for state in self._program.step.states]
            return Box(name, "cache", "its own cache", ", ".join(names), len(nodes))
        if len(nodes) > 1 or name != node.name:
            return Box(name, "block", name.partition(":")[2] or "other", _operators(nodes), len(nodes), layer)
        return self._single(node, layer)

    def _single(self, node: fx.Node, layer: str) -> Box:
        kind = type_text(node.meta.get("val"), self._names)
        if node.op == "placeholder":
            return Box(node.name, "input", node.name, kind, 1)
        if node.op == "output":
            return Box(node.name, "output", "output", ", ".join(n.name for n in node.all_input_nodes), 1)
        return Box(node.name, "node", target_text(node), f"{node.name}: {kind}", 1, layer)

    def _attention(self, node: fx.Node) -> tuple[str, str]:
        site = next((site for site in self._program.sites if site.node is node), None)
        if site is None:
            return f"attention: {target_text(node)}", module_path(node)
        mask = "" if site.mask is None else f", {site.mask.kind}"
        window = f" {site.mask.window}" if site.mask is not None and site.mask.window else ""
        dims = str(site.k_dim) if site.k_dim == site.v_dim else f"{site.k_dim}/{site.v_dim}"
        cache = f"; cache {site.cache}" + (", shared" if site.shares else "") if is_call(node, CACHED_OP) else ""
        detail = f"{site.heads}/{site.kv_heads} heads of {dims}{mask}{window}{cache}"
        return f"attention {site.layer}: {target_text(node).removesuffix('.default')}", detail


def _layer(path: str) -> str:
    found = _LAYER.match(path)
    return found[1] if found else ""


def _cuts(node: fx.Node) -> bool:
    return is_attention(node) or is_call(node, STATEFUL_OP, STATEFUL_SITE_OP)


def _operators(nodes: list[fx.Node]) -> str:
    counted = Counter(target_text(node).split(".")[1 if "." in target_text(node) else 0] for node in nodes)
    shown = [f"{name} {count}" if count > 1 else name for name, count in counted.most_common(_SHOWN)]
    return ", ".join(shown) + (", …" if len(counted) > _SHOWN else "")
