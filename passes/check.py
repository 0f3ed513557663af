"""The verifier that runs between passes: structure, shapes and dtypes, signature, mutations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from lethe_compile.errors import VerificationError
from lethe_compile.passes.program import (
    WRITING_OPS,
    Program,
    attribute,
    is_symbolic,
    same_size,
    shape_of,
    source_of,
    written,
)

INPUTS = ("input_ids", "position_ids", "attention_mask", "positions", "new_lengths", "has_previous_state", "seen")
CACHE_INPUTS = ("k_pages_", "v_pages_", "slot_position_", "slot_mass_", "page_table", "length", "state_")


def check(program: Program) -> None:
    """Check a graph between two passes.

    The graph must lint; every value recomputed under FakeTensor must have the shape and dtype on record; the inputs
    must be known roles, the output one tensor; only the ops that carry state may write, and only inputs.

    Raises:
        VerificationError: names the node and what is wrong with it.
    """
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise VerificationError(f"the graph is malformed: {error}") from error
    _check_signature(program)
    _check_writes(program)
    propagate(program)


def fake_mode_of(program: Program) -> FakeTensorMode:
    """The FakeTensor mode that the graph was captured under: its symbols are the graph's dynamic sizes."""
    mode: FakeTensorMode = program.input_ids.meta["val"].fake_mode
    return mode


def propagate(program: Program) -> None:
    """Recompute `meta["val"]` of nodes that have none or whose operands changed; it must agree with what is on record.

    Linear in the nodes that a pass touched: a value whose operands are as before is not computed again.
    """
    mode = fake_mode_of(program)
    changed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        operands = tuple(node.all_input_nodes)
        fresh = "val" not in node.meta or node.meta.get("lethe_operands", operands) != operands
        node.meta["lethe_operands"] = operands
        if not fresh and changed.isdisjoint(operands):
            continue
        value = _fake_value(program.module, node, mode)
        if "val" not in node.meta:
            changed.add(node)
            node.meta["val"] = value
        elif (why := _difference(node.meta["val"], value)) is not None:
            raise _broken(node, f"a value changed: {why}")


@contextmanager
def shapes_alone(mode: FakeTensorMode) -> Iterator[None]:
    """Operators on values without data: with the Python dispatcher, whose decompositions take symbolic sizes."""
    with mode, enable_python_dispatcher(), torch.no_grad():
        yield


def _fake_value(module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> Any:
    if node.op == "get_attr":
        value = attribute(module, str(node.target))
        return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
    if node.op != "call_function" or not callable(node.target):
        raise _broken(node, f"a {node.op}, which no pass should leave in the graph")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        with shapes_alone(mode):
            return node.target(*args, **kwargs)
    except Exception as error:  # whatever an operator raises on its operands is the finding
        raise _broken(node, f"{node.target} does not compute: {error}") from error


def _difference(known: Any, value: Any) -> str | None:
    if not isinstance(known, Tensor) or not isinstance(value, Tensor):
        return None if type(known) is type(value) else f"{type(known).__name__} became {type(value).__name__}"
    if known.dtype != value.dtype:
        return f"dtype {known.dtype} became {value.dtype}"
    if len(known.shape) != len(value.shape) or not all(map(_compatible, known.shape, value.shape)):
        return f"shape {tuple(known.shape)} became {tuple(value.shape)}"
    return None


def _compatible(known: Any, size: Any) -> bool:
    # Two symbols may stand for one size that the capture did not unify; a number never stands for a dynamic size.
    return same_size(known, size) or is_symbolic(size)


def _check_signature(program: Program) -> None:
    for node in program.placeholders():
        name = str(node.target)
        if name not in INPUTS and not name.startswith(CACHE_INPUTS):
            raise _broken(node, f"the graph has an input '{name}', which no role explains")
    output = program.graph.output_node()
    if not isinstance(output.args[0], fx.Node) or len(shape_of(output.args[0])) != 3:
        raise _broken(output, "the graph must return one tensor, logits [batch, tokens, vocabulary]")


def _check_writes(program: Program) -> None:
    for node in program.graph.nodes:
        for target in written(node):
            if node.target not in WRITING_OPS or target.op != "placeholder":
                raise _broken(node, f"{node.target} writes '{target.name}'")


def _broken(node: fx.Node, reason: str) -> VerificationError:
    where = source_of(node)
    return VerificationError(reason, node=f"{node.name}, at {where}" if where else node.name)
