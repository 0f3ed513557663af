"""Writes to intermediate tensors as new values: what an exported graph computes, without mutation.

`ExportedProgram.run_decompositions` does this by tracing the program twice more, which takes longer than the export.
Here one walk over the graph does it, in the cases that models have; others are left to it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from lethe_compile.passes.program import is_call, written

aten = torch.ops.aten

_TURNED = (aten.transpose, aten.t, aten.mT)  # their own inverses
_SHAPED = (aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze, aten._unsafe_view)
_PASSED_ON = (aten.detach, aten.alias, aten.to, aten.contiguous, aten.type_as, aten.lift_fresh)


class NotLocal(Exception):
    """A write that this rewrite cannot express; the message says which."""


def functionalize(graph: fx.Graph, *, state: bool = False) -> None:
    """Replace every ``op_(x, …)`` on an intermediate tensor by ``op(x, …)``, and what aliases x by views of the result.

    before => after: ``v = slice(x, …); add_(v, 1); y = f(x)``  =>  ``x1 = slice_scatter(x, add(v, 1), …); y = f(x1)``

    With `state` an input or a buffer may be written too: what becomes of it is copied to it at the graph's end. Which
    tensors alias is read off the storages that the export recorded. The graph is half rewritten when this raises.

    Raises:
        NotLocal: the target is an input or a buffer, or a view of a kind that cannot be written through.
    """
    ends: dict[fx.Node, fx.Node] = {}  # of inputs and buffers, their last values
    for node in list(graph.nodes):
        if is_call(node, aten.detach_):  # writes no value
            node.target = aten.detach.default
        targets = list(written(node))
        if targets:
            if len(targets) != 1 or targets[0] is not node.args[0]:
                raise NotLocal(f"{node.target} writes {len(targets)} operands")
            _replace(graph, node, targets[0], ends, state)
    with graph.inserting_before(graph.output_node()):
        for base, value in ends.items():
            graph.call_function(aten.copy_.default, (base, value))


def _replace(graph: fx.Graph, write: fx.Node, target: fx.Node, ends: dict[fx.Node, fx.Node], state: bool) -> None:
    chain = _views(target)  # from the target up to the tensor that owns the storage
    base = chain[-1]
    if base.op != "call_function" and not state:
        raise NotLocal(f"'{write.name}' writes '{base.name}', which is no intermediate tensor")
    order = {node: index for index, node in enumerate(graph.nodes)}
    aliases = [n for n in graph.nodes if n is not base and _storage(n) == _storage(base)]
    before = [n for n in aliases if order[n] < order[write]]
    with graph.inserting_before(write):
        value = _call(graph, _functional(write), write.args, write.kwargs)
        for view, parent in pairwise(chain):
            value = _scattered(graph, value, view, parent)
        owner = next((node for node, end in ends.items() if end is base), base)
        if owner.op != "call_function":
            ends[owner] = value
        renewed = {base: value}
        for alias in (*before, write):
            later = [user for user in alias.users if order.get(user, -1) > order[write]]
            if later:
                source = target if alias is write else alias
                new = _again(graph, source, base, renewed)
                for user in later:
                    user.replace_input_with(alias, new)
    for user in [user for user in base.users if order.get(user, -1) > order[write]]:
        user.replace_input_with(base, value)
    graph.erase_node(write)
    for node in aliases:  # what follows shows the new storage
        if order[node] > order[write]:
            if node.op != "call_function":
                raise NotLocal(f"'{node.name}' shares memory with '{base.name}'")
            node.meta["val"] = _value(node.target, node.args, node.kwargs)


def _views(node: fx.Node) -> list[fx.Node]:
    """`node`, what it is a view of, and so on."""
    chain = [node]
    while (parent := _viewed(chain[-1])) is not None:
        chain.append(parent)
    return chain


def _viewed(node: fx.Node) -> fx.Node | None:
    """The operand whose storage `node` shares."""
    if node.op != "call_function" or _storage(node) is None:
        return None
    return next((n for n in node.all_input_nodes if _storage(n) == _storage(node)), None)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _functional(write: fx.Node) -> Any:
    schema = write.target._schema  # type: ignore[union-attr]
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    if not schema.name.startswith("aten::") or not schema.name.endswith("_") or packet is None:
        raise NotLocal(f"{write.target} has no form without a write")
    return getattr(packet, schema.overload_name or "default")


def _scattered(graph: fx.Graph, value: fx.Node, view: fx.Node, parent: fx.Node) -> fx.Node:
    """`parent` with `value` in place of what `view` shows of it."""
    rest = view.args[1:]
    if is_call(view, aten.slice, aten.select):
        scatter = aten.slice_scatter.default if is_call(view, aten.slice) else aten.select_scatter.default
        return _call(graph, scatter, (parent, value, *rest), view.kwargs)
    if is_call(view, *_TURNED):
        return _call(graph, view.target, (value, *rest), view.kwargs)
    if is_call(view, aten.permute):
        order = list(rest[0])  # type: ignore[arg-type]
        return _call(graph, aten.permute.default, (value, [order.index(dim) for dim in range(len(order))]), {})
    if is_call(view, *_SHAPED):
        return _call(graph, aten.view_as.default, (value, parent), {})
    if is_call(view, *_PASSED_ON):
        return value
    raise NotLocal(f"a write through {view.target}, at '{view.name}'")


def _again(graph: fx.Graph, view: fx.Node, base: fx.Node, renewed: dict[fx.Node, fx.Node]) -> fx.Node:
    """The view anew, of what replaced its base."""
    if view in renewed:
        return renewed[view]
    parent = _viewed(view)
    if parent is None:
        raise NotLocal(f"'{view.name}' shares memory with '{base.name}' and is no view of it")
    source = _again(graph, parent, base, renewed)
    args, kwargs = fx.node.map_arg((view.args, view.kwargs), lambda n: source if n is parent else n)
    renewed[view] = new = _call(graph, view.target, args, kwargs)
    return new


def _call(graph: fx.Graph, target: Any, args: Any, kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, dict(kwargs))
    node.meta["val"] = _value(target, args, kwargs)
    return node


def _value(target: Any, args: Any, kwargs: Any) -> Any:
    given = fx.node.map_arg((args, dict(kwargs)), lambda n: n.meta["val"])
    with _mode(given), torch.no_grad():
        return target(*given[0], **given[1])


def _mode(values: Any) -> Any:
    found: list[Any] = []
    tree_map_only(Tensor, lambda t: found.append(getattr(t, "fake_mode", None)), values)
    return next(mode for mode in found if mode is not None)
