"""A graph in numbers: how often it calls each op, what it takes and returns, and what does not belong there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, fx

from lethe_compile.passes.program import (
    CACHED_OP,
    COLUMNS_SITE_OP,
    SITE_OP,
    STATEFUL_SITE_OP,
    VISIBLE_SITE_OP,
    WRITING_OPS,
    Program,
    is_symbolic,
    shape_of,
    written,
)

_SITES = (SITE_OP, STATEFUL_SITE_OP, COLUMNS_SITE_OP, VISIBLE_SITE_OP)
_ATTENTION = ("aten::_softmax", "aten::softmax", "aten::_safe_softmax", "aten::scaled_dot_product_attention")
_OURS = ("lethe",)
_ARITHMETIC = ("_operator", "builtins", "math", "aten", "prims", "prim")  # what the passes may bring in


@dataclass(frozen=True)
class Value:
    """An input or output of a graph; sizes that may vary are expressions such as "s0"."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class GraphSummary:
    """Counts of calls by the op's name, as ``aten::mm``, and the signature."""

    nodes: int
    ops: Mapping[str, int]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> GraphSummary:
        """Gather it from a graph whose nodes know their values."""
        calls = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
        counts = Counter(op_name(node) for node in calls)
        outputs = graph.output_node().all_input_nodes
        inputs = graph.find_nodes(op="placeholder")
        ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        return cls(len(graph.nodes), ordered, tuple(map(_value, inputs)), tuple(map(_value, outputs)))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ops": dict(self.ops)}


@dataclass(frozen=True)
class Unexpected:
    """An op that a rewritten graph should not hold."""

    op: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.op} ({self.count} ×): {self.reason}"


@dataclass(frozen=True)
class GraphChange:
    """The graph as it was captured, and what runs; `before` is None where nothing recorded it."""

    before: GraphSummary | None
    after: GraphSummary
    attention_layers: int
    unexpected: tuple[Unexpected, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": None if self.before is None else self.before.to_dict(),
            "after": self.after.to_dict(),
            "attention_layers": self.attention_layers,
            "unexpected": [asdict(one) for one in self.unexpected],
        }


def op_name(node: fx.Node) -> str:
    """``namespace::op`` of a call, its overload left out; of Python functions, module and name."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is not None:
        return str(packet._qualified_op_name)
    if isinstance(node.target, str):
        return f"{node.op}::{node.target}"
    module = str(getattr(node.target, "__module__", "") or type(node.target).__module__)
    return f"{module.partition('.')[0]}::{getattr(node.target, '__name__', node.target)}"


def _value(node: fx.Node) -> Value:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return Value(str(node.target if node.op == "placeholder" else node.name), str(value.dtype)[6:], _sizes(value))
    return Value(node.name, type(value).__name__, ())


def _sizes(value: Tensor) -> tuple[str, ...]:
    return tuple(str(size) for size in value.shape)


def unexpected_ops(program: Program, before: GraphSummary | None) -> tuple[Unexpected, ...]:
    """What a finished program should not hold, each kind with its reason.

    Markers of a pass that never ended, attention over tokens beside the cached op, writes to anything but the cache,
    ops of foreign libraries that the captured graph did not have, and other than one cached attention a layer.
    """
    found: Counter[tuple[str, str]] = Counter()
    for node in program.graph.nodes:
        if node.op == "call_function" and (reason := _reason(node, before)):
            found[op_name(node), reason] += 1
    attentions = len(program.graph.find_nodes(op="call_function", target=CACHED_OP))
    if attentions != len(program.sites):
        found[op_name_of(CACHED_OP), f"{len(program.sites)} attention layers were located"] = attentions
    return tuple(Unexpected(op, count, reason) for (op, reason), count in found.items())


def op_name_of(op: Any) -> str:
    """``namespace::op`` of an overload."""
    return str(op.overloadpacket._qualified_op_name)


def _reason(node: fx.Node, before: GraphSummary | None) -> str | None:
    name = op_name(node)
    if node.target in _SITES:
        return "a marker that a pass should have replaced"
    if name in _ATTENTION and shape_of(node) and is_symbolic(shape_of(node)[-1]):
        return "attention over tokens that is not cached and not pruned"
    if node.target not in WRITING_OPS and any(True for _ in written(node)):
        return "writes to a tensor that is not the cache"
    namespace = name.partition("::")[0]
    known = before is None or name in before.ops or namespace in (*_OURS, *_ARITHMETIC)
    return None if known else "of a library that the captured graph did not call"
