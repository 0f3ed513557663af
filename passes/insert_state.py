"""Insert state: every call of a stateful module goes on from the tokens before, in tensors that become inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.kernels.recurrent.call import StatefulCall, registered
from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.check import fake_mode_of
from lethe_compile.passes.program import (
    STATEFUL_OP,
    STATEFUL_SITE_OP,
    Program,
    ancestors,
    is_call,
    is_symbolic,
    remove_dead,
    same_size,
    shape_of,
    source_of,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertState:
    """Give stateful modules their state.

    ``recurrent_site([x, …], [padding mask, …], call)``  =>
    ``recurrent([x, …], [state, …], has_previous_state, new_lengths, call)``

    New inputs: `new_lengths`, `has_previous_state`, and ``state_c_i``, tensor i of the state of call c. Conditions: the
    padding masks come from the input `attention_mask` alone, so that a row without padding needs none, which is how the
    op runs each; operands have rows and tokens where they are expected; every call that was captured is in the graph,
    once.
    """

    name: ClassVar[str] = "insert-state"

    def run(self, program: Program) -> PassResult:
        nodes = [node for node in program.graph.nodes if is_call(node, STATEFUL_SITE_OP)]
        _check_all_there(program, nodes)
        if not nodes:
            return PassResult(program)
        common = [_add_input(program, "has_previous_state", (), torch.bool, torch.device("cpu"))]
        rows = shape_of(program.input_ids)[0]
        common.append(_add_input(program, "new_lengths", (rows,), torch.int32, program.device))
        notes = []
        for node in nodes:
            call = registered(int(node.args[2]))
            _check_operands(program, node, call)
            _check_padding(node)
            inserted = _insert(program, node, call, common)
            kept = ", ".join(f"{list(place.shape)}" for place in call.places)
            notes.append(Note(inserted.name, f"{call.name} keeps {kept} a row"))
        remove_dead(program.graph)
        program.module.recompile()
        return PassResult(program, tuple(notes))


def _check_all_there(program: Program, nodes: list[fx.Node]) -> None:
    found = [registered(int(node.args[2])) for node in nodes]  # type: ignore[arg-type]
    for call in program.stateful:
        if found.count(call) != 1:
            raise UnsupportedGraphError(
                f"a stateful module is {found.count(call)} times in the graph, and once in the model", where=call.name
            )


def _check_operands(program: Program, node: fx.Node, call: StatefulCall) -> None:
    """Operands must have rows and tokens where they had them when the module was found."""
    batch, tokens = shape_of(program.input_ids)
    operands: Any = node.args[0]
    for operand, layout in zip(operands, call.layouts, strict=True):
        shape = shape_of(operand)
        dims = {layout.batch: batch, layout.tokens: tokens}
        fits = all(same_size(size, dims[d]) if d in dims else not is_symbolic(size) for d, size in enumerate(shape))
        if not fits:
            sizes = ", ".join(map(str, shape))
            reason = (
                f"'{operand.name}' [{sizes}] enters a stateful module and has not the layout that it was tried with"
            )
            raise UnsupportedGraphError(reason, node=node.name, where=source_of(node) or None)


def _check_padding(node: fx.Node) -> None:
    """Refuse what the model hands the module only under capture, unless it is made of the padding mask alone."""
    padding: Any = node.args[1]
    for mask in padding:
        sources = {str(n.target) for n in ancestors(mask, stop=(aten.sym_size,)) if n.op == "placeholder"}
        if sources != {"attention_mask"}:
            reason = f"'{mask.name}', which a stateful module gets in the graph, is no mask of padding"
            raise UnsupportedGraphError(reason, node=node.name, where=source_of(node) or None)


def _insert(program: Program, node: fx.Node, call: StatefulCall, common: list[fx.Node]) -> fx.Node:
    operands, _, number = node.args
    index, rows = program.stateful.index(call), shape_of(program.input_ids)[0]
    states = [
        _add_input(program, f"state_{index}_{i}", (rows, *place.shape), place.dtype, program.device)
        for i, place in enumerate(call.places)
    ]
    with program.graph.inserting_before(node):
        inserted = program.graph.call_function(STATEFUL_OP, (operands, states, *common, number))
    inserted.meta.update(node.meta)
    inserted.meta.pop("lethe_operands", None)
    node.replace_all_uses_with(inserted)
    program.graph.erase_node(node)
    return inserted


def _add_input(
    program: Program, name: str, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device
) -> fx.Node:
    with program.graph.inserting_after(program.placeholders()[-1]):
        node = program.graph.placeholder(name)
    with fake_mode_of(program):
        node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
    return node
