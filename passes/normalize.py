"""Normalise: take out of a captured graph what says nothing about the computation, so that later passes see few forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.program import Program, argument, is_call, remove_dead, same_size, shape_of

aten = torch.ops.aten

_ASSERTIONS = (
    aten._assert_tensor_metadata,
    aten._assert_scalar,
    aten._assert_async,
    aten.sym_constrain_range,
    aten.sym_constrain_range_for_size,
)
_ALIASES = (aten.detach, aten.detach_, aten.alias, aten.lift_fresh, aten.lift_fresh_copy)
_REGIONS = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)


@dataclass(frozen=True)
class Normalize:
    """Strip assertions and identities, inline regions, and name each size once.

    ======================================================  ==============================================
    before                                                  after
    ======================================================  ==============================================
    ``_assert_tensor_metadata(x, …)``, guards               (nothing)
    ``detach(x)``, ``alias(x)``, ``lift_fresh_copy(x)``     ``x``
    ``to(x, its own dtype)``, ``dropout(x, p, False)``      ``x``
    ``wrap_with_set_grad_enabled(flag, region, *args)``     the region's nodes
    ``sym_size(any input, d)`` equal to a size of the ids   ``sym_size(input_ids, d)``
    ======================================================  ==============================================

    Conditions: an autocast region is inlined only where it is disabled, and an alias is dropped only where its source is
    not written afterwards.
    """

    name: ClassVar[str] = "normalize"

    def run(self, program: Program) -> PassResult:
        graph, notes = program.graph, []
        notes += _inline_regions(program.module)
        for node in list(graph.nodes):
            if node.op == "call_module" or is_call(node, *_ASSERTIONS):
                graph.erase_node(node)
            elif (source := _identity(node)) is not None:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        _unify_sizes(program)
        dropped = remove_dead(graph)
        program.module.recompile()
        if dropped:
            notes.append(Note(dropped[-1], f"{len(dropped)} dead nodes dropped"))
        return PassResult(program, tuple(notes))


def _identity(node: fx.Node) -> fx.Node | None:
    """What `node` merely passes on, or None where it does something."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if is_call(node, *_ALIASES):
        return source
    if is_call(node, aten.dropout) and argument(node, 2, "train") is False:
        return source
    if is_call(node, aten.dropout) and argument(node, 1, "p") == 0:
        return source
    if is_call(node, aten.to, aten.type_as, aten._to_copy) and not argument(node, 3, "copy", False):
        before, after = source.meta.get("val"), node.meta.get("val")
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            same = before.dtype == after.dtype and before.device == after.device
            return source if same and before.layout == after.layout else None
    return None


def _inline_regions(module: fx.GraphModule) -> list[Note]:
    notes = []
    for node in list(module.graph.nodes):
        if not is_call(node, *_REGIONS):
            continue
        grad = node.target is _REGIONS[0]
        if not grad and argument(node, 2, "enabled") is True:
            continue  # an enabled autocast changes dtypes: left as the operator it is
        region, inputs = (node.args[1], node.args[2:]) if grad else (node.args[4], node.args[5:])
        assert isinstance(region, fx.Node)
        inner = getattr(module, str(region.target))
        _inline_regions(inner)
        outputs = _splice(module, node, inner, inputs)
        for user in list(node.users):  # each is operator.getitem(node, i)
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        notes.append(Note(node.name, "region inlined"))
    return notes


def _splice(module: fx.GraphModule, before: fx.Node, inner: fx.GraphModule, inputs: Any) -> Any:
    """Copy the nodes of `inner` into `module`'s graph ahead of `before`; what `inner` returns, as nodes out there."""
    values = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], inputs, strict=True))
    with module.graph.inserting_before(before):
        for node in inner.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: values[n])
            if node.op != "placeholder":
                values[node] = module.graph.node_copy(node, lambda n: values[n])
                if node.op == "get_attr":
                    setattr(module, str(node.target), getattr(inner, str(node.target)))
    raise AssertionError("an FX graph ends in an output")


def _unify_sizes(program: Program) -> None:
    """Read batch and tokens off `input_ids` alone, so that other inputs can go when nothing else needs them."""
    ids, graph = program.input_ids, program.graph
    last = program.placeholders()[-1]
    with graph.inserting_after(last):
        sizes = [graph.call_function(aten.sym_size.int, (ids, dim)) for dim in (1, 0)][::-1]
    for dim, size in enumerate(sizes):
        size.meta["val"] = shape_of(ids)[dim]
    for node in list(graph.nodes):
        if not is_call(node, aten.sym_size) or node in sizes:
            continue
        source, dim = node.args[0], node.args[1]
        inputs_differ = isinstance(source, fx.Node) and source.op == "placeholder" and dim in (0, 1)
        equal = [s for d, s in enumerate(sizes) if same_size(shape_of(ids)[d], node.meta["val"])]
        replacement = sizes[int(dim)] if inputs_differ else (equal[0] if equal else None)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
