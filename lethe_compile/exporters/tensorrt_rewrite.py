"""An ONNX model brought within the limits of TensorRT's parser, with the same results but for float64's last bits.

============================================  ==========================================================
before                                        after
============================================  ==========================================================
float64, in the products of a round           float32
``CumSum`` of integers                        of the same numbers in float32, exact up to 2^24
``Clip`` of integers                          ``Max`` and ``Min``
``Equal`` of booleans                         ``Not`` of ``Xor``
============================================  ==========================================================

In float32 a score that lies within rounding of the breakpoint may fall on its other side, and a recent window of
``ratio · tokens`` be one token shorter or longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def within_limits(model: ir.Model) -> None:
    """Rewrite a model in place."""
    for node in list(model.graph):
        if node.op_type == "CumSum":
            _sum_floats(node)
        elif node.op_type == "Clip":
            _as_bounds(node)
        elif node.op_type == "Equal":
            _as_logic(node)
    _narrow(model)


def _narrow(model: ir.Model) -> None:
    """float64 becomes float32 everywhere."""
    import onnx_ir as ir

    double, single = ir.DataType.DOUBLE, ir.DataType.FLOAT
    for value in (*model.graph.initializers.values(), *(out for node in model.graph for out in node.outputs)):
        if value.const_value is not None and value.const_value.dtype == double:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
        if value.dtype == double:
            value.dtype = single
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == double:
                narrow = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[name] = ir.AttrTensor(name, narrow)
        if node.op_type == "Cast" and node.attributes.get_int("to") == double:
            node.attributes["to"] = ir.AttrInt64("to", single)


def _sum_floats(node: ir.Node) -> None:
    import onnx_ir as ir

    given = node.inputs[0]
    assert given is not None
    if given.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return
    (result,) = node.outputs
    to_float = _before(node, "Cast", [given], {"to": ir.DataType.FLOAT}, ir.DataType.FLOAT, "float")
    node.replace_input_with(0, to_float)
    back = ir.node("Cast", [result], {"to": given.dtype}, name=f"{node.name}/integer")
    back.outputs[0].dtype = given.dtype
    _take_place(result, back.outputs[0])
    back.replace_input_with(0, result)
    result.dtype = ir.DataType.FLOAT
    _graph(node).insert_after(node, back)


def _as_bounds(node: ir.Node) -> None:
    import onnx_ir as ir

    given = node.inputs[0]
    assert given is not None
    if given.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return
    current = given
    for bound, op in zip((*node.inputs[1:], None)[:2], ("Max", "Min"), strict=True):
        if bound is not None:
            current = _before(node, op, [current, bound], {}, given.dtype, op.lower())
    _take_place(node.outputs[0], current)
    _graph(node).remove(node, safe=True)


def _as_logic(node: ir.Node) -> None:
    import onnx_ir as ir

    left, right = node.inputs
    assert left is not None and right is not None
    if left.dtype != ir.DataType.BOOL:
        return
    differ = _before(node, "Xor", [left, right], {}, ir.DataType.BOOL, "xor")
    same = _before(node, "Not", [differ], {}, ir.DataType.BOOL, "not")
    _take_place(node.outputs[0], same)
    _graph(node).remove(node, safe=True)


def _take_place(old: ir.Value, new: ir.Value) -> None:
    """`new` is read wherever `old` was, and has its name."""
    import onnx_ir as ir

    new.name, old.name, new.shape = old.name, f"{old.name}/before", old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _before(
    node: ir.Node, op: str, inputs: list[ir.Value], attributes: dict[str, int], dtype: ir.DataType, suffix: str
) -> ir.Value:
    """The result of a new node in front of another."""
    import onnx_ir as ir

    made = ir.node(op, inputs, attributes, name=f"{node.name}/{suffix}")
    made.outputs[0].name, made.outputs[0].dtype = f"{node.outputs[0].name}/{suffix}", dtype
    _graph(node).insert_before(node, made)
    return made.outputs[0]


def _graph(node: ir.Node) -> ir.Graph:
    import onnx_ir as ir

    assert isinstance(node.graph, ir.Graph)
    return node.graph
