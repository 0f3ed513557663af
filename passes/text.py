"""A graph as text, one node a line: what it is called, its dtype and sizes, the call, and the module that it is from.

Names hold across passes, and sizes say B for rows, T for tokens and P for positions so far, so that two such texts
can be compared line by line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from lethe_compile.passes.program import Program, is_symbolic, module_path, shape_of

_SHORT = {
    "torch.float32": "f32", "torch.float64": "f64", "torch.float16": "f16", "torch.bfloat16": "bf16",
    "torch.int64": "i64", "torch.int32": "i32", "torch.int8": "i8", "torch.uint8": "u8", "torch.bool": "bool",
}  # fmt: skip


def sizes_named(program: Program) -> dict[str, str]:
    """What the symbols of the graph's dynamic sizes mean: B rows, T tokens, P positions."""
    names: dict[str, str] = {}
    for name, letters in (("input_ids", "BT"), ("seen", "P")):
        node = program.placeholder(name)
        for size, letter in zip(shape_of(node) if node is not None else (), letters, strict=False):
            if is_symbolic(size):
                names.setdefault(str(size), letter)
    return names


def size_text(size: Any, names: Mapping[str, str]) -> str:
    """A size, symbolic or not, with symbols by their `names`."""
    return re.sub(r"\w+", lambda match: names.get(match[0], match[0]), str(size))


def type_text(value: Any, names: Mapping[str, str]) -> str:
    """``f32[B, T, 384]`` of a tensor; of a number its expression; "" of what is not known."""
    if isinstance(value, Tensor):
        shape = ", ".join(size_text(size, names) for size in value.shape)
        return f"{_SHORT.get(str(value.dtype), str(value.dtype))}[{shape}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(one, names) for one in value)})"
    return "" if value is None else size_text(value, names)


def target_text(node: fx.Node) -> str:
    """What a node calls, ``aten.linear.default``; of an input or an attribute its name."""
    if isinstance(node.target, str):
        return node.target
    name = str(node.target)
    return name if not name.startswith("<") else getattr(node.target, "__name__", name)


def graph_lines(program: Program) -> list[str]:
    """The whole graph, a line for each node, in the order of execution."""
    names = sizes_named(program)
    return [_line(node, names) for node in program.graph.nodes]


def _line(node: fx.Node, names: Mapping[str, str]) -> str:
    kind = type_text(node.meta.get("val"), names)
    typed = f"%{node.name}: {kind}" if kind else f"%{node.name}"
    if node.op == "output":
        return f"return {_value(node.args[0], names)}"
    if node.op == "placeholder":
        return f"input {typed}"
    if node.op == "get_attr":
        return f"{typed} = attribute {node.target}"
    arguments = [_value(value, names) for value in node.args]
    arguments += [f"{key}={_value(value, names)}" for key, value in node.kwargs.items()]
    where = module_path(node)
    comment = f"  # {where}" if where else ""
    return f"{typed} = {target_text(node)}({', '.join(arguments)}){comment}"


def _value(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_value(one, names) for one in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return size_text(value, names) if is_symbolic(value) else repr(value)


def difference(before: list[str], after: list[str], name: str, context: int = 3) -> Iterator[str]:
    """The unified diff across pass `name` of two graphs as `graph_lines`; nothing where they are the same."""
    yield from difflib.unified_diff(before, after, f"before {name}", f"after {name}", n=context, lineterm="")
