"""Normalise: take out of a graph what says nothing about the computation, so that later passes see few forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.program import (
    Program,
    argument,
    attribute,
    is_call,
    operand,
    remove_dead,
    same_size,
    same_sizes,
    shape_of,
)

aten = torch.ops.aten

_ASSERTIONS = (
    aten._assert_tensor_metadata,
    aten._assert_scalar,
    aten._assert_async,
    aten.sym_constrain_range,
    aten.sym_constrain_range_for_size,
)
_ALIASES = (aten.detach, aten.detach_, aten.alias, aten.lift_fresh, aten.lift_fresh_copy)
_VIEWS = (aten.view.default, aten._unsafe_view)  # an attention op need not lay out its result as the model's own did
_CONVERSIONS = (aten.to, aten.type_as, aten._to_copy)
_REGIONS = {  # position of the region among the arguments; what follows it are the region's own
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,  # disabled: capture has written out an enabled one
}


@dataclass(frozen=True)
class Normalize:
    """Strip assertions and identities, inline regions, and name each size once.

    ======================================================  ==============================================
    before                                                  after
    ======================================================  ==============================================
    ``_assert_tensor_metadata(x, …)``, guards               (nothing)
    ``detach(x)``, ``alias(x)``, ``lift_fresh_copy(x)``     ``x``
    ``to(x, its own dtype)``, ``dropout(x, p, False)``      ``x``
    ``to(constant, another device)``                        the constant, there
    ``view(x, shape)``, recorded for one memory layout      ``reshape(x, shape)``
    ``wrap_with_set_grad_enabled(flag, region, *args)``     the region's nodes
    ``sym_size(any input, d)`` equal to a size of the ids   ``sym_size(input_ids, d)``
    ======================================================  ==============================================

    Condition: nothing in the graph writes, so that a copy is as good as what it copies; capture sees to that.
    """

    name: ClassVar[str] = "normalize"

    def run(self, program: Program) -> PassResult:
        graph = program.graph
        notes = tidy(program.module)
        _unify_sizes(program)
        if dead := remove_dead(graph):
            notes.append(Note(graph.output_node().name, f"{dead} dead nodes dropped"))
        program.module.recompile()
        return PassResult(program, tuple(notes))


def tidy(module: fx.GraphModule) -> list[Note]:
    """Inline regions, strip assertions and identities, and make every view a reshape."""
    notes, graph = _inline_regions(module), module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" or is_call(node, *_ASSERTIONS):  # a module is torch.export's input guards
            graph.erase_node(node)
        elif (source := _identity(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif is_call(node, *_VIEWS):
            node.target = aten.reshape.default
        elif is_call(node, *_CONVERSIONS):
            _move_constant(module, node)
    return notes


def _move_constant(module: fx.GraphModule, node: fx.Node) -> None:
    """A constant that every step would send to the device, which no CUDA graph can record, is sent there once."""
    source, after = operand(node), node.meta.get("val")
    if not isinstance(source, fx.Node) or source.op != "get_attr" or not isinstance(after, Tensor):
        return
    constant = attribute(module, str(source.target))
    if isinstance(constant, torch.nn.Parameter) or not isinstance(constant, Tensor) or constant.device == after.device:
        return
    name = f"{str(source.target).replace('.', '_')}_{node.name}"
    module.register_buffer(name, constant.to(after.device, after.dtype), persistent=False)
    with module.graph.inserting_before(source):
        moved = module.graph.get_attr(name)
    moved.meta.update(node.meta)
    node.replace_all_uses_with(moved)
    module.graph.erase_node(node)


def _identity(node: fx.Node) -> fx.Node | None:
    """What `node` merely passes on, or None where it does something."""
    source = operand(node)
    if not isinstance(source, fx.Node):
        return None
    if is_call(node, *_ALIASES):
        return source
    if is_call(node, aten.dropout) and (argument(node, 2, "train") is False or argument(node, 1, "p") == 0):
        return source
    if is_call(node, aten.copy):
        source = argument(node, 1, "src")
        same = same_sizes(shape_of(node), shape_of(source)) and node.meta["val"].dtype == source.meta["val"].dtype
        return source if same else None
    if is_call(node, *_CONVERSIONS):
        before, after = source.meta.get("val"), node.meta.get("val")
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            same = (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
            return source if same else None
    return None


def _inline_regions(module: fx.GraphModule) -> list[Note]:
    notes = []
    for node in list(module.graph.nodes):
        if not is_call(node, *_REGIONS):
            continue
        first = _REGIONS[node.target]
        region: Any = node.args[first]
        inner = attribute(module, region.target)
        _inline_regions(inner)
        outputs = _splice(module, node, inner, node.args[first + 1 :])
        for user in list(node.users):  # each is operator.getitem(node, i)
            user.replace_all_uses_with(outputs[argument(user, 1, "index")])
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
            if node.op == "placeholder":
                continue
            values[node] = module.graph.node_copy(node, lambda n: values[n])
            if node.op == "get_attr":
                name = f"{before.name}_{str(node.target).replace('.', '_')}"  # the region's names are its own
                setattr(module, name, attribute(inner, str(node.target)))
                values[node].target = name
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
        source, dim = operand(node), argument(node, 1, "dim")
        if source.op == "placeholder":  # every input is [batch, tokens]
            replacement = sizes[dim]
        else:
            replacement = next((s for s in sizes if same_size(s.meta["val"], node.meta["val"])), None)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
