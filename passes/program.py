"""What the passes rewrite: one FX graph of a decoder, and what has been learned about it so far."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

import lethe_compile.kernels.ops  # noqa: F401  (registers the operators)
from lethe_compile.kernels.recurrent.call import StatefulCall

SITE_OP = torch.ops.lethe.attention_site.default
BIAS = 5  # its place among the arguments of an `attention_site`
CACHED_OP = torch.ops.lethe.attention.default
STATEFUL_SITE_OP = torch.ops.lethe.recurrent_site.default
STATEFUL_OP = torch.ops.lethe.recurrent.default
COLUMNS_SITE_OP = torch.ops.lethe.columns_site.default
COLUMNS_OP = torch.ops.lethe.columns.default
VISIBLE_SITE_OP = torch.ops.lethe.visible_site.default
VISIBLE_OP = torch.ops.lethe.visible.default
WRITING_OPS = (CACHED_OP, STATEFUL_OP)
# Calls that take no more than the shape of their operand.
SHAPE_ONLY = (
    *(torch.ops.aten.sym_size, torch.ops.aten.ones_like, torch.ops.aten.zeros_like, torch.ops.aten.full_like),
    *(torch.ops.aten.empty_like, torch.ops.aten.new_ones, torch.ops.aten.new_zeros, torch.ops.aten.new_full),
    torch.ops.aten.new_empty,
)
SOFTMAX = (torch.ops.aten.softmax, torch.ops.aten._softmax, torch.ops.aten._safe_softmax)
_LOG_SOFTMAX = (torch.ops.aten.log_softmax, torch.ops.aten._log_softmax)
STATE_OPS = (*WRITING_OPS, COLUMNS_OP, VISIBLE_OP)  # those that write the state, and those that only read it


@dataclass(frozen=True)
class Mask:
    """A proved attention mask: each query sees the keys at its own and earlier positions.

    With `window`, at most so many of them; where windows are `chunked`, only those in its own ``position // window``.
    """

    window: int | None = None
    longest: int | None = None  # tokens that a mask stored as a table was made for
    chunked: bool = False
    evidence: str = field(default="", compare=False)  # what was evaluated to prove it

    @property
    def kind(self) -> str:
        return "causal" if self.window is None else "chunked" if self.chunked else "sliding"


@dataclass(frozen=True)
class Site:
    """One attention of the graph. `node` is an `attention_site`, after insertion the cached `lethe::attention`."""

    layer: int
    node: fx.Node
    name: str  # the module path in the user's model, or the node's name
    found_by: str  # "interface" | "sdpa" | "softmax"
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    softcap: float | None
    sinks: bool
    mask: Mask | None = None
    slopes: tuple[float, ...] | None = None  # ALiBi's, one a head: a score falls by slope * (q - p)
    content: bool = False  # the bias is an operand by position, computed from the tokens of the sequence
    columns: int = 0  # numbers cached beside each key for that
    latent: bool = False  # its values are the first `v_dim` channels of its keys, and stored with them alone
    alternative: int | None = None  # numbers a token of the form, latent or expanded, that was not chosen
    cache_group: int = 0  # which page pool: layers of one geometry share one
    cache: int = 0  # which cache, of those that layers have of their own
    shares: bool = False  # it attends to the cache of an earlier layer, whose keys and values are its own too
    kv_parts: int = 1  # ranks of tensor parallelism that hold different KV heads of it: so many times its own in all
    keep_sets: int = 1  # rows of the cache that one sequence has in it: 1, or one for each KV head

    @property
    def geometry(self) -> tuple[int, int, int, bool]:
        """(KV heads, numbers a key, numbers a value, whether these are the key's first) of one row, as cached."""
        return self.kv_heads // self.keep_sets, self.k_dim + self.columns, self.v_dim, self.latent

    @property
    def numbers(self) -> int:
        """Cached of each token as keys and values."""
        return self.kv_heads * (self.k_dim + (0 if self.latent else self.v_dim))


@dataclass(frozen=True)
class State:
    """A value that a decode step takes from the step before: `node` is an input of the graph, `after` its new value."""

    name: str  # as the model calls it
    node: fx.Node
    after: fx.Node
    counts: bool = False  # how many tokens there were, instead of keys or values


@dataclass(frozen=True)
class Step:
    """What the inputs of a decode step mean, and how its state goes on. Its graph returns logits and new states."""

    roles: Mapping[fx.Node, str]  # "input_ids" | "position" | "attention_mask"
    states: tuple[State, ...]
    least: int = 0  # tokens that must be before it, as guards of torch.compile say; see `complete_step`

    @property
    def caches(self) -> tuple[State, ...]:
        return tuple(state for state in self.states if not state.counts)


@dataclass(frozen=True)
class Program:
    """A decoder graph ``(placeholders) -> logits [B, T, vocab]`` between two passes, free of writes.

    Placeholders are named by role: `input_ids` is always there, `position_ids` and `attention_mask` while the graph
    takes them. After insertion the inputs are `input_ids`, `positions`, `new_lengths`, the cache's tensors, which the
    cached op alone writes, the state of stateful modules, which `lethe::recurrent` alone writes, and `seen`, the
    positions so far, where masks depend on the content.

    A graph with a cache of its own comes from its capture with `step`, and locate-cache makes it one of sequences.
    """

    module: fx.GraphModule
    expected_layers: int | None = None  # attentions that the model was seen to run, where that is known
    sites: tuple[Site, ...] = ()
    stateful: tuple[StatefulCall, ...] = ()  # the calls behind `recurrent_site` nodes, later `lethe::recurrent`
    step: Step | None = None
    longest: int | None = None  # tokens that the cache of the captured graph had room for

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def placeholder(self, name: str) -> fx.Node | None:
        """The graph input called `name`, or None."""
        return next((n for n in self.placeholders() if n.target == name), None)

    def placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def caches(self) -> tuple[Site, ...]:
        """The sites with a cache of their own, in order; once attention is inserted."""
        return tuple(site for site in self.sites if not site.shares)

    @property
    def input_ids(self) -> fx.Node:
        node = self.placeholder("input_ids")
        assert node is not None, "capture names the token ids 'input_ids'"
        return node

    @property
    def content(self) -> bool:
        """Whether masks depend on the content of the sequence: the graph then has the input `seen`."""
        return any(site.content for site in self.sites)

    @property
    def device(self) -> torch.device:
        """Where the graph was captured, and runs."""
        device: torch.device = self.input_ids.meta["val"].device
        return device


def with_cache_groups(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Number the page pools: layers of one KV geometry share a pool."""
    groups: dict[tuple[int, int, int, bool], int] = {}
    return tuple(replace(s, cache_group=groups.setdefault(s.geometry, len(groups))) for s in sites)


def with_caches(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Number the caches: sites that attend to the very same keys and values, under the same mask, share one."""
    owners: dict[tuple[Any, ...], int] = {}
    numbered = []
    for site in sites:
        assert site.mask is not None, "masks are proved first"
        own = site.layer if site.content else None  # what its mask reads is cached beside the keys, and read before
        cached = (*site.node.args[1:3], site.mask.window, site.mask.chunked, own)
        shares, cache = cached in owners, owners.setdefault(cached, len(owners))
        numbered.append(replace(site, cache=cache, shares=shares))
    return tuple(numbered)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets`: an OpOverload, or a packet, which stands for all of its overloads."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is t or (packet is not None and packet is t) for t in targets)


def may_be_attention(node: fx.Node) -> bool:
    """Whether `node` is a softmax over tokens, or an operator that calls itself attention; not one of a known form."""
    if is_call(node, *SOFTMAX, *_LOG_SOFTMAX):
        shape, dim = shape_of(node), argument(node, 1, "dim")
        return len(shape) >= 3 and is_symbolic(shape[dim])
    known = is_call(node, SITE_OP, torch.ops.aten.scaled_dot_product_attention)
    return node.op == "call_function" and not known and "attention" in str(node.target)


def ancestors(node: fx.Node, stop: Collection[Any] = (), within: Collection[fx.Node] = ()) -> list[fx.Node]:
    """`node` and everything that it is computed from, in graph order.

    Not what only calls of `stop`, or the nodes `within`, read.
    """
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend([] if current in within or is_call(current, *stop) else current.all_input_nodes)
    return [n for n in node.graph.nodes if n in seen]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def operand(node: Any) -> Any:
    """The first argument of a call, None for anything else."""
    return node.args[0] if isinstance(node, fx.Node) and node.op == "call_function" and node.args else None


def attribute(module: Any, path: str) -> Any:
    """The parameter, buffer or constant that a `get_attr` node names by its dotted path."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def shape_of(node: Any) -> tuple[Any, ...]:
    """Shape of a node's value (ints or SymInts); () for a value that is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are certainly equal: as ints, or as symbolic expressions. Never guards."""
    expressions = [getattr(getattr(s, "node", None), "expr", s) for s in (left, right)]
    return bool(expressions[0] == expressions[1])


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are certainly equal."""
    return len(left) == len(right) and all(map(same_size, left, right))


def is_symbolic(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


def source_of(node: fx.Node) -> str:
    """Where a node came from, for messages: module path and source line as far as the graph knows them."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().split("\n")]
    files = [line for line in trace if line.startswith("File ")]
    return ", ".join(part for part in (module_path(node), files[-1] if files else "") if part)


def module_path(node: fx.Node) -> str:
    """The path of the innermost `nn.Module` that made a node, such as ``model.layers.3.self_attn``; "" if unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack and "_empty_nn" not in str(stack[-1][0]) else ""


def remove_dead(graph: fx.Graph) -> int:
    """Drop nodes whose result nobody uses, placeholders apart; how many they were."""
    dead = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
            dead += 1
    return dead


def written(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose tensors a call writes, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    for position, formal in enumerate(schema.arguments):
        if formal.alias_info is not None and formal.alias_info.is_write:
            actual = argument(node, position, formal.name)
            targets = actual if isinstance(actual, (list, tuple)) else [actual]
            yield from (n for n in targets if isinstance(n, fx.Node))
