"""What TensorRT's ONNX parser takes: a table of operators, types and limits, and a check that names every violation.

Source: the operator support matrices of ONNX-TensorRT, releases 8.6 and 10.0 to 10.1 (``docs/operators.md``), and the
parser's limits on TopK, scatters and cumulative sums stated there. Later 10.x releases add operators and types; what
passes here is taken by them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lethe_compile.errors import ConfigError

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBER = _FLOAT | {"INT32", "INT64"}
_ANY = _NUMBER | {"BOOL"}
_TOPK = 3840

_OPERATORS: Mapping[frozenset[str], str] = {
    frozenset({"BOOL"}): "And Not Or Xor",
    _FLOAT: (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh"
        " CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalMaxPool GroupNormalization HardSigmoid"
        " HardSwish Hardmax InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax"
        " LpNormalization MatMul MaxPool MeanVarianceNormalization Mish PRelu Pow QuantizeLinear Reciprocal Resize"
        " Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"
    ),
    _NUMBER: (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min"
        " Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin"
        " ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"
    ),
    _ANY: (
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot"
        " Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where"
    ),
    _ANY | {"UINT8"}: "Cast CastLike",
}
_DATA = {"Where": 1}  # the operand whose type counts, where it is not the first
_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceL2", "ReduceProd", "ReduceSumSquare")


@dataclass(frozen=True)
class Version:
    """What differs between TensorRT releases."""

    opsets: tuple[int, int]
    without: frozenset[str] = frozenset()  # operators
    no_integers: frozenset[str] = frozenset()  # operators that take floating point alone
    types: frozenset[str] = _ANY | {"UINT8"}


VERSIONS: Mapping[str, Version] = {
    "8.6": Version(
        (9, 17),
        frozenset({"Gelu", "Mish", "CastLike", "Hardmax"}),
        frozenset(name for name in _OPERATORS[_NUMBER].split() if name.startswith("Reduce")),
        (_ANY | {"UINT8"}) - {"BFLOAT16", "INT64"},  # int64 is cast down to int32 with a warning
    ),
    "10.0": Version((9, 20)),
    "10.1": Version((9, 20)),
}
LATEST = "10.1"


@dataclass(frozen=True)
class Violation:
    """One thing that the parser would not take: at which node, and why."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} '{self.node}': {self.reason}"


def violations(model: ir.Model, version: str = LATEST) -> list[Violation]:
    """Everything in an ONNX model that TensorRT's parser of that version would refuse, in graph order.

    Raises:
        ConfigError: a version that the table does not have.
    """
    if version not in VERSIONS:
        raise ConfigError(f"version={version!r} is not allowed: must be one of {', '.join(VERSIONS)}")
    rules = VERSIONS[version]
    found = list(_opset(model, rules))
    for value in (*model.graph.inputs, *model.graph.outputs):
        kind = _kind(value)
        if kind is not None and kind not in rules.types | {"INT64"}:
            found.append(Violation(str(value.name), "input or output", f"its type {kind} is not supported"))
    for node in model.graph.all_nodes():
        found.extend(_node(node, rules))
    return found


def _opset(model: ir.Model, rules: Version) -> Iterator[Violation]:
    opset, (first, last) = model.opset_imports.get("", 0), rules.opsets
    if not first <= opset <= last:
        yield Violation(str(model.graph.name), "model", f"opset {opset} is not in {first}..{last}")


def _node(node: ir.Node, rules: Version) -> Iterator[Violation]:
    name = str(node.name)
    supported = {op: types for types, ops in _OPERATORS.items() for op in ops.split()}
    if node.domain not in ("", "ai.onnx"):
        yield Violation(name, node.op_type, f"the operators of {node.domain} are not supported")
        return
    if node.op_type not in supported or node.op_type in rules.without:
        yield Violation(name, node.op_type, "the operator is not supported")
        return
    types = supported[node.op_type] & (_FLOAT if node.op_type in rules.no_integers else rules.types | {"INT64"})
    values = [node.inputs[at]] if (at := _DATA.get(node.op_type, 0)) < len(node.inputs) else []
    values += [node.outputs[0]] if node.op_type in ("Cast", "CastLike", "Constant", "ConstantOfShape") else []
    for value in values:
        kind = None if value is None else _kind(value)
        is_shape = node.op_type == "ConstantOfShape" and value is node.inputs[0]
        if kind is not None and not is_shape and kind not in types:
            yield Violation(name, node.op_type, f"the type {kind} is not supported, of {', '.join(sorted(types))}")
    if (check := _LIMITS.get(node.op_type)) is not None and (reason := check(node)) is not None:
        yield Violation(name, node.op_type, reason)


def _kind(value: ir.Value) -> str | None:
    """The type of a value's elements, None where the model does not say."""
    dtype = value.dtype if value.dtype is not None or value.const_value is None else value.const_value.dtype
    return None if dtype is None else str(dtype.name)


def constant(value: Any) -> Any:
    """The array of a value that is known when the engine is built, else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant":
        return producer.attributes["value"].as_tensor().numpy() if "value" in producer.attributes else True
    return None


def _is_constant(name: str, position: int) -> Callable[[ir.Node], str | None]:
    def check(node: ir.Node) -> str | None:
        given = node.inputs[position] if position < len(node.inputs) else None
        return f"'{name}' must be a constant" if given is not None and constant(given) is None else None

    return check


def _no_reduction(node: ir.Node) -> str | None:
    reduction = node.attributes.get_string("reduction", "none")
    return None if reduction == "none" else f"reduction={reduction!r} is not supported"


def _few(node: ir.Node) -> str | None:
    count = constant(node.inputs[1])
    if count is None:
        return "'K' must be a constant"
    if int(count.flatten()[0]) > _TOPK:
        return f"K = {int(count.flatten()[0])} is more than {_TOPK}"
    return None if node.attributes.get_int("sorted", 1) == 1 else "sorted must be 1"


_LIMITS: Mapping[str, Callable[[ir.Node], str | None]] = {
    "CumSum": _is_constant("axis", 1),
    "Slice": _is_constant("axes", 3),
    "Squeeze": _is_constant("axes", 1),
    "Unsqueeze": _is_constant("axes", 1),
    "Pad": _is_constant("axes", 3),
    "OneHot": _is_constant("depth", 1),
    "ScatterElements": _no_reduction,
    "ScatterND": _no_reduction,
    "TopK": _few,
    **{name: _is_constant("axes", 1) for name in _REDUCTIONS},
}
